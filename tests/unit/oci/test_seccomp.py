"""Seccomp profiles: the table of the default one is complete; files are honoured or refused."""

from __future__ import annotations

import collections
import ctypes
import errno
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import CriError, InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.oci import seccomp
from criserver.oci.capabilities import DEFAULT_CAPABILITIES

GROUPS, FILTERS = seccomp.default_table()
NAMESPACE_FLAGS = 0x7E020000
EVERY_CAPABILITY = {c for group in GROUPS if not isinstance(group.allow, str) for c in group.allow}
# libseccomp's tokens (seccomp.h): AUDIT_ARCH_* of the kernel, and one of its own for x32.
LIBSECCOMP_ARCHITECTURES = {
    "x86_64": 0xC000003E,
    "x86": 0x40000003,
    "x32": 0x4000003E,
    "aarch64": 0xC00000B7,
    "arm": 0x40000028,
}
HEADERS = (
    "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "/usr/include/x86_64-linux-gnu/asm/unistd_32.h",
    "/usr/include/x86_64-linux-gnu/asm/unistd_x32.h",
    "/usr/include/aarch64-linux-gnu/asm/unistd_64.h",
)


def answers(profile: seccomp.Seccomp, name: str, *args: int) -> set[str]:
    """What the rules that match a call say, as libseccomp evaluates them: "ALLOW", or the names of errors."""
    found = set()
    for rule in profile["syscalls"]:
        if name not in rule["names"] or not all(_matches(a, args) for a in rule.get("args", ())):
            continue
        found.add("ALLOW" if rule["action"] == "SCMP_ACT_ALLOW" else errno.errorcode[rule["errnoRet"]])
    return found or {errno.errorcode[profile["defaultErrnoRet"]]}


def _matches(condition: dict[str, Any], args: tuple[int, ...]) -> bool:
    assert condition["op"] == "SCMP_CMP_MASKED_EQ"
    return args[condition["index"]] & condition["value"] == condition["valueTwo"]


def default(capabilities: Collection[str] = DEFAULT_CAPABILITIES) -> seccomp.Seccomp:
    return seccomp.default_profile(capabilities, "amd64")


def classified() -> collections.Counter[str]:
    return collections.Counter([n for group in GROUPS for n in group.syscalls] + [f.syscall for f in FILTERS])


# What was decided where containerd's default of August 2026 and the kernel's tables leave a choice: the answer without
# any capability, and the capabilities that allow the call. A line changes with a decision, whose reason is in the data.
DECIDED: dict[str, tuple[str, set[str]]] = {
    # Not ours to give away: containerd's default has them behind the same capability, or not at all.
    "process_madvise": ("EPERM", {"CAP_SYS_PTRACE"}),
    "kcmp": ("EPERM", {"CAP_SYS_PTRACE"}),
    "pidfd_getfd": ("EPERM", {"CAP_SYS_PTRACE"}),
    "userfaultfd": ("EPERM", set()),
    "pivot_root": ("EPERM", set()),
    "move_pages": ("EPERM", set()),
    "migrate_pages": ("EPERM", set()),
    "mbind": ("EPERM", {"CAP_SYS_NICE"}),
    "set_mempolicy_home_node": ("EPERM", {"CAP_SYS_NICE"}),
    "bpf": ("EPERM", {"CAP_BPF", "CAP_SYS_ADMIN"}),
    "perf_event_open": ("EPERM", {"CAP_PERFMON", "CAP_SYS_ADMIN"}),
    "syslog": ("EPERM", {"CAP_SYSLOG", "CAP_SYS_ADMIN"}),
    "clone3": ("ENOSYS", {"CAP_SYS_ADMIN"}),
    "mount_setattr": ("EPERM", {"CAP_SYS_ADMIN"}),
    "open_by_handle_at": ("EPERM", {"CAP_DAC_READ_SEARCH"}),
    "io_uring_setup": ("EPERM", set()),
    "keyctl": ("EPERM", set()),
    # Newer than what others have decided on.
    "file_getattr": ("ENOSYS", set()),
    "file_setattr": ("ENOSYS", set()),
    "open_tree_attr": ("ENOSYS", set()),
    "uprobe": ("ENOSYS", set()),
    # Of 32-bit programs of the 1990s.
    **dict.fromkeys(
        """nice oldfstat oldlstat oldolduname oldstat olduname readdir sgetmask sigaction signal sigpending sigsuspend
        ssetmask uselib ustat sysfs vm86""".split(),
        ("EPERM", set()),
    ),
    # Numbers without a call behind them: containerd lets the kernel say so.
    "epoll_ctl_old": ("ENOSYS", set()),
    "epoll_wait_old": ("ENOSYS", set()),
    "_sysctl": ("ENOSYS", set()),
    "get_tls": ("ENOSYS", set()),
    # Allowed, as containerd has them.
    **dict.fromkeys(
        """uretprobe lsm_set_self_attr statmount listmount mseal setxattrat map_shadow_stack memfd_secret
        landlock_restrict_self process_mrelease process_vm_writev fanotify_mark futex_waitv cachestat modify_ldt
        arch_prctl vmsplice name_to_handle_at""".split(),
        ("ALLOW", set()),
    ),
}
# The calls of one architecture alone.
OF_ONE_ARCHITECTURE = {
    "amd64": {"arch_prctl", "modify_ldt"},
    "arm64": {
        "arm_fadvise64_64",
        "arm_sync_file_range",
        "breakpoint",
        "cacheflush",
        "set_tls",
        "sync_file_range2",
    },
}


@pytest.mark.parametrize("name", DECIDED)
def test_a_decided_call_is_as_it_was_decided(name: str) -> None:
    without, by_capability = DECIDED[name]
    assert answers(default([]), name) == {without}
    assert {c for c in EVERY_CAPABILITY if answers(default([c]), name) != {without}} == by_capability
    for capability in by_capability:
        assert answers(default([capability]), name) == {"ALLOW"}


def test_the_calls_of_an_architecture_are_allowed_on_it_alone() -> None:
    for here, names in OF_ONE_ARCHITECTURE.items():
        for architecture in OF_ONE_ARCHITECTURE:
            profile = seccomp.default_profile([], architecture)
            expected = "ALLOW" if architecture == here else "ENOSYS"
            assert {a for name in names for a in answers(profile, name)} == {expected}, architecture
    groups = [g for g in GROUPS if g.architectures]
    assert {(a, n) for g in groups for a in g.architectures for n in g.syscalls} == {
        (a, n) for a, names in OF_ONE_ARCHITECTURE.items() for n in names
    }


def test_a_call_is_in_one_place() -> None:
    assert [name for name, count in classified().items() if count > 1] == []


def test_every_call_that_libseccomp_knows_is_classified() -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp.so.2 is not installed")
    resolve = library.seccomp_syscall_resolve_num_arch
    resolve.restype = ctypes.c_void_p
    known = set()
    for name, token in LIBSECCOMP_ARCHITECTURES.items():
        base = 0x40000000 if name == "x32" else 0
        # From 0xf0000 on: the private calls of arm.
        for number in (*range(1024), *range(0xF0000, 0xF0010)):
            if found := resolve(token, base | number):
                known.add(ctypes.string_at(found).decode())
    assert len(known) > 400
    assert known - set(classified()) == set()


@pytest.mark.parametrize("header", HEADERS)
def test_every_call_of_the_kernels_headers_is_classified(header: str) -> None:
    if not os.path.exists(header):
        pytest.skip(f"{header} is not installed")
    with open(header) as f:
        known = set(re.findall(r"^#define __NR_(\w+) ", f.read(), re.MULTILINE))
    assert len(known) > 300
    assert known - set(classified()) == set()


def test_every_group_says_why_and_from_where() -> None:
    rules: tuple[seccomp.Group | seccomp.Filter, ...] = (*GROUPS, *FILTERS)
    for one in rules:
        assert one.reason.endswith(".")
        assert one.source
    assert all(one.reason.endswith(".") for one in seccomp.default_architectures().values())
    assert len({g.name for g in GROUPS}) == len(GROUPS)
    assert {g.allow for g in GROUPS if isinstance(g.allow, str)} == {"always", "never"}


@pytest.mark.parametrize(
    "name", ["read", "execve", "fork", "openat", "futex", "setuid", "chown", "ptrace", "chroot", "mmap2", "socketcall"]
)
def test_ordinary_work_is_allowed(name: str) -> None:
    assert answers(default(), name) == {"ALLOW"}


@pytest.mark.parametrize(
    "name",
    [
        "mount",
        "unshare",
        "setns",
        "sethostname",
        "bpf",
        "init_module",
        "keyctl",
        "io_uring_setup",
        "kexec_load",
        "reboot",
    ],
)
def test_what_reaches_beyond_the_container_is_not_permitted(name: str) -> None:
    assert answers(default(), name) == {"EPERM"}


@pytest.mark.parametrize("name", ["clone3", "nfsservctl", "a_call_of_the_future"])
def test_what_programs_fall_back_from_is_not_implemented(name: str) -> None:
    assert answers(default(), name) == {"ENOSYS"}


@pytest.mark.parametrize("group", [g for g in GROUPS if not isinstance(g.allow, str)], ids=lambda g: g.name)
def test_each_of_a_groups_capabilities_is_enough(group: seccomp.Group) -> None:
    for name in group.syscalls:
        assert answers(default([]), name) == {group.errno}
        for capability in group.allow:
            assert answers(default([capability]), name) == {"ALLOW"}


def test_no_capability_allows_what_is_never_allowed() -> None:
    for group in GROUPS:
        if group.allow == "never":
            assert {a for n in group.syscalls for a in answers(default(EVERY_CAPABILITY), n)} == {group.errno}


@given(st.integers(0, 2**64 - 1))
def test_clone_makes_no_namespaces(flags: int) -> None:
    expected = "EPERM" if flags & NAMESPACE_FLAGS else "ALLOW"
    assert answers(default(), "clone", flags) == {expected}
    assert answers(default(["CAP_SYS_ADMIN"]), "clone", flags) == {"ALLOW"}


@given(st.integers(0, 47) | st.sampled_from([38, 40]), st.integers(0, 2**32 - 1))
def test_sockets_of_every_family_but_two(family: int, upper: int) -> None:
    expected = "EAFNOSUPPORT" if family in (38, 40) else "ALLOW"
    # The kernel looks at an int: bits above it neither hide a family nor forbid one.
    assert answers(default(), "socket", upper << 32 | family) == {expected}


@given(st.integers(0, 2**32 - 1) | st.sampled_from([0, 8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF]))
def test_personalities(persona: int) -> None:
    allowed = persona in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
    found = answers(default(), "personality", persona)
    assert found == {"ALLOW"} if allowed else found <= {"EPERM", "ENOSYS"} and len(found) == 1
    assert answers(default(), "personality", 0x40000) == {"EPERM"}


def test_the_default_is_made_for_the_architecture() -> None:
    assert default()["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert seccomp.default_profile([], "arm64")["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    with pytest.raises(UnimplementedError, match="s390x"):
        seccomp.default_profile([], "s390x")


def test_a_profile_is_the_callers_own() -> None:
    default()["syscalls"][0]["names"].clear()
    assert answers(default(), "read") == {"ALLOW"}


def resolve(document: object, capabilities: Collection[str] = (), architecture: str = "amd64") -> seccomp.Seccomp:
    return seccomp.resolve(json.dumps(document).encode(), "profile p", capabilities, architecture, "5.10.0-8-amd64")


def rules(**rule: Any) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", **rule}],
    }


def test_a_file_becomes_the_runtimes_object() -> None:
    document = {
        "comment": "ours",
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "listenerPath": "",
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": None, "comment": "", "includes": {}},
            {"name": "open", "action": "SCMP_ACT_ERRNO", "errnoRet": 13, "errno": "EACCES", "args": []},
            {"names": ["close"], "action": "SCMP_ACT_ERRNO", "errno": "EIO"},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 2**64 - 1, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
                "excludes": None,
            },
        ],
    }
    assert resolve(document) == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["open"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["close"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 2**64 - 1, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
            },
        ],
    }


def test_a_program_may_answer_calls_but_only_where_a_rule_for_this_node_says_so() -> None:
    document = {**rules(action="SCMP_ACT_NOTIFY"), "listenerPath": "/run/agent.sock", "listenerMetadata": "for it"}
    found = resolve(document)
    assert (found["listenerPath"], found["listenerMetadata"]) == ("/run/agent.sock", "for it")
    assert found["syscalls"] == [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]
    elsewhere = rules(action="SCMP_ACT_NOTIFY", includes={"arches": ["s390x"]})
    assert resolve({**elsewhere, "listenerPath": None, "listenerMetadata": None})["syscalls"] == []


def test_the_shortest_file() -> None:
    assert resolve({"defaultAction": "SCMP_ACT_LOG"}) == {"defaultAction": "SCMP_ACT_LOG", "syscalls": []}


@pytest.mark.parametrize(
    ("conditions", "applies"),
    [
        ({"includes": {"caps": ["CAP_BPF"]}}, True),
        ({"includes": {"caps": ["CAP_BPF", "CAP_SYS_ADMIN"]}}, False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, True),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}}, False),
        ({"includes": {"arches": ["arm64", "amd64"]}}, True),
        ({"includes": {"arches": ["arm64"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"excludes": {"arches": ["s390x"]}}, True),
        ({"includes": {"minKernel": "5.10"}}, True),
        ({"includes": {"minKernel": "5.11"}}, False),
        ({"includes": {"minKernel": "4.8"}}, True),
        ({"excludes": {"minKernel": "5.10"}}, False),
        ({"excludes": {"minKernel": "6.0"}}, True),
        ({"includes": {"caps": None, "arches": []}, "excludes": {"caps": []}}, True),
        ({"includes": {"caps": ["CAP_BPF"]}, "excludes": {"arches": ["amd64"]}}, False),
    ],
)
def test_conditions(conditions: dict[str, Any], applies: bool) -> None:
    found = resolve(rules(**conditions), ["CAP_BPF"])["syscalls"]
    assert found == ([{"names": ["read"], "action": "SCMP_ACT_ALLOW"}] if applies else [])


def test_architectures_by_the_hosts() -> None:
    document = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            {"architecture": "SCMP_ARCH_S390X", "subArchitectures": None},
        ],
    }
    assert resolve(document)["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert resolve(document, architecture="s390x")["architectures"] == ["SCMP_ARCH_S390X"]
    assert "architectures" not in resolve(document, architecture="arm64")


def test_unset_keys_are_those_of_programs_that_write_profiles() -> None:
    """Go's JSON has "", null and empty lists where nothing is set. A rule that names no call does nothing."""
    document = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": [], "action": "SCMP_ACT_ERRNO"},
            {"names": None, "action": "SCMP_ACT_ERRNO"},
            {"name": "", "action": "SCMP_ACT_ERRNO"},
            {"names": ["read"], "name": "", "action": "SCMP_ACT_ERRNO", "comment": None, "includes": {"minKernel": ""}},
            {"name": "open", "names": None, "action": "SCMP_ACT_ERRNO", "excludes": {"minKernel": None}},
            {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "SCMP_CMP_EQ"}]},
        ],
    }
    assert resolve(document)["syscalls"] == [
        {"names": ["read"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["open"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "args": [{"value": 0, "index": 0, "op": "SCMP_CMP_EQ"}]},
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "top level"),
        ({}, "defaultAction"),
        ({"defaultAction": "ALLOW"}, "key defaultAction"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "key defaultAction"),
        ({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/agent"}, "key defaultAction"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "agent"}, "key listenerPath"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/" + "a" * 107}, "key listenerPath"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "m"}, "key listenerMetadata"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "sycalls": []}, "sycalls"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrno": "EVERYTHING"}, "key defaultErrno"),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86"],
                "archMap": [{"architecture": "SCMP_ARCH_X86"}],
            },
            "architectures and archMap",
        ),
        (rules(name="read"), "key syscalls.0: .* names or"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}, "key syscalls.0: .* names or"),
        (rules(action="SCMP_ACT_NOTIFY"), "key listenerPath"),
        (rules(errnoRet=4096), "key syscalls.0.errnoRet"),
        (rules(errno="__name__"), "key syscalls.0: key errno"),
        (rules(args=[{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]), "key syscalls.0.args.0.index"),
        (rules(args=[{"index": 0, "value": 2**64, "op": "SCMP_CMP_EQ"}]), "key syscalls.0.args.0.value"),
        (rules(args=[{"index": 0, "value": 0, "op": "=="}]), "key syscalls.0.args.0.op"),
        (rules(includes={"minKernel": "new"}), "key syscalls.0.includes.minKernel"),
        (rules(includes={"minKernel": f"4.{'9' * 5000}"}), "key syscalls.0.includes.minKernel"),
    ],
)
def test_a_bad_file_is_refused_with_the_key(document: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^profile p: .*{message}"):
        resolve(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["syscalls", "names", "action", "args"]), inner),
)


@given(st.binary() | JSON.map(lambda d: json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": d}).encode()))
def test_any_text_is_taken_or_refused(text: bytes) -> None:
    try:
        seccomp.resolve(text, "profile p", (), "amd64", "6.1")
    except CriError as e:
        assert str(e).startswith("profile p")


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rules()))
    found = seccomp.localhost_profile(str(path), (), "amd64", "6.1")
    assert found["syscalls"] == [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]


def test_a_path_without_a_profile(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=str(tmp_path / "no.json")):
        seccomp.localhost_profile(str(tmp_path / "no.json"), (), "amd64", "6.1")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * (seccomp.MAX_PROFILE + 1))
    for path, reason in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "large", "larger"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            seccomp.localhost_profile(str(path), (), "amd64", "6.1")
    with pytest.raises(InvalidArgumentError, match="absolute"):
        seccomp.localhost_profile("p.json", (), "amd64", "6.1")
