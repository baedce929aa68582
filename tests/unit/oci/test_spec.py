"""The OCI runtime spec is a pure function of the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import InvalidArgumentError
from criserver.model import (
    Device,
    Mount,
    NamespaceMode,
    Namespaces,
    Propagation,
    Resources,
    Security,
    User,
)
from criserver.oci import spec
from criserver.oci.capabilities import DEFAULT_CAPABILITIES, lacking
from criserver.oci.spec_inputs import DeviceNode, HostFacts, ImageDefaults, PodFacts, SpecDefaults
from criserver.oci.spec_mounts import own_paths
from criserver.oci.spec_resources import in_force, resource_limits, unenforced
from tests.support.samples import CONFIG

HOST = HostFacts(
    capabilities=(*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN", "CAP_NET_ADMIN"),
    oom_score_adj_floor=-500,
    hugepage_sizes=frozenset({"2MB"}),
)
POD = PodFacts(
    hostname="pod",
    resolv_conf="/s/resolv.conf",
    hosts="/s/hosts",
    hostname_file="/s/hostname",
    shm="/s/shm",
    net_namespace="/n/net",
    ipc_namespace="/n/ipc",
    uts_namespace="/n/uts",
    pid_namespace=None,
)


def build(
    image: ImageDefaults | None = None,
    pod: PodFacts = POD,
    nodes: Sequence[DeviceNode] = (),
    host: HostFacts = HOST,
    selinux_label: str = "",
    mount_label: str = "",
    apparmor_profile: str = "",
    defaults: SpecDefaults | None = None,
    real_paths: Mapping[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    return spec.build(
        config=dataclasses.replace(CONFIG, **changes),
        image=image or ImageDefaults(),
        user=User(1, 2, (2, 3)),
        pod=pod,
        host=host,
        cgroups_path="/p/c",
        rootfs="/r",
        devices=nodes,
        selinux_label=selinux_label,
        mount_label=mount_label,
        apparmor_profile=apparmor_profile,
        defaults=defaults,
        real_paths=real_paths or {},
    )


@pytest.mark.parametrize(
    ("command", "args", "entrypoint", "cmd", "expected"),
    [
        ((), (), ("e",), ("c",), ["e", "c"]),
        ((), ("a",), ("e",), ("c",), ["e", "a"]),
        (("k",), (), ("e",), ("c",), ["k"]),
        (("k",), ("a",), ("e",), ("c",), ["k", "a"]),
        ((), (), (), ("c",), ["c"]),
    ],
)
def test_the_command_line(
    command: tuple[str, ...],
    args: tuple[str, ...],
    entrypoint: tuple[str, ...],
    cmd: tuple[str, ...],
    expected: list[str],
) -> None:
    image = ImageDefaults(entrypoint=entrypoint, cmd=cmd)
    assert build(image, command=command, args=args)["process"]["args"] == expected


def test_no_command_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no command"):
        build(command=())


def test_the_environment_is_the_images_with_the_kubelets_over_it() -> None:
    image = ImageDefaults(env=("A=1", "B=2=3", "PATH=/own"))
    env = build(image, envs=(("B", "x"), ("C", "")))["process"]["env"]
    assert env == ["PATH=/own", "HOSTNAME=pod", "A=1", "B=x", "C="]


def test_lines_of_an_image_that_set_no_variable() -> None:
    image = ImageDefaults(env=("", "=x", "A=1", "A", "HOSTNAME", "B=", "PATH"))
    assert build(image)["process"]["env"] == ["B="]
    assert build(image, envs=(("PATH", "/p"),))["process"]["env"] == ["B=", "PATH=/p"]


def test_namespaces_are_joined_made_or_the_hosts() -> None:
    own = build()["linux"]["namespaces"]
    assert {n["type"]: n.get("path") for n in own} == {
        "mount": None,
        "pid": None,
        "network": "/n/net",
        "ipc": "/n/ipc",
        "uts": "/n/uts",
    }
    shared = build(
        namespaces=Namespaces(pid=NamespaceMode.POD), pod=dataclasses.replace(POD, pid_namespace="/proc/9/ns/pid")
    )
    assert {"type": "pid", "path": "/proc/9/ns/pid"} in shared["linux"]["namespaces"]
    hosts = dataclasses.replace(POD, net_namespace=None, uts_namespace=None)
    host = build(namespaces=Namespaces(pid=NamespaceMode.NODE), pod=hosts)
    assert [n["type"] for n in host["linux"]["namespaces"]] == ["mount", "ipc"]


def test_a_mount_of_the_kubelets_replaces_the_sandboxs_file() -> None:
    mount = Mount("/etc/hosts", "/h/hosts", readonly=True, propagation=Propagation.PRIVATE)
    found = [m for m in build(mounts=(mount,))["mounts"] if m["destination"] == "/etc/hosts"]
    assert found == [
        {"destination": "/etc/hosts", "type": "bind", "source": "/h/hosts", "options": ["rbind", "rprivate", "ro"]}
    ]


paths = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5).map(lambda p: "/" + "/".join(p))


@given(st.lists(paths, max_size=8))
def test_a_parent_is_mounted_before_what_lies_below_it(destinations: list[str]) -> None:
    mounts = tuple(Mount(d, "/h", readonly=False, propagation=Propagation.PRIVATE) for d in destinations)
    order = [m["destination"] for m in build(mounts=mounts)["mounts"]]
    for index, destination in enumerate(order):
        for later in order[index + 1 :]:
            assert not destination.startswith(later + "/"), (later, destination)
    assert order.count("/proc") == 1


def test_propagation_reaches_the_root() -> None:
    def propagation(kind: Propagation) -> str | None:
        mount = Mount("/m", "/h", readonly=False, propagation=kind)
        return build(mounts=(mount,))["linux"].get("rootfsPropagation")

    assert propagation(Propagation.PRIVATE) is None
    assert propagation(Propagation.HOST_TO_CONTAINER) == "rslave"
    assert propagation(Propagation.BIDIRECTIONAL) == "rshared"


@pytest.mark.parametrize(
    ("security", "bounding", "ambient"),
    [
        ({}, set(DEFAULT_CAPABILITIES), set()),
        ({"add_capabilities": ("SYS_ADMIN",)}, {*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"}, set()),
        ({"add_capabilities": ("all",)}, set(HOST.capabilities), set()),
        ({"drop_capabilities": ("ALL",)}, set(), set()),
        ({"drop_capabilities": ("ALL",), "add_capabilities": ("cap_chown",)}, {"CAP_CHOWN"}, set()),
        ({"add_capabilities": ("ALL",), "drop_capabilities": ("CHOWN",)}, {*HOST.capabilities} - {"CAP_CHOWN"}, set()),
        ({"ambient_capabilities": ("NET_ADMIN",)}, {*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN"}, {"CAP_NET_ADMIN"}),
        ({"privileged": True, "drop_capabilities": ("ALL",)}, set(HOST.capabilities), set()),
    ],
)
def test_capabilities(security: dict[str, Any], bounding: set[str], ambient: set[str]) -> None:
    found = build(security=Security(**security))["process"]["capabilities"]
    assert set(found["bounding"]) == set(found["effective"]) == set(found["permitted"]) == bounding
    assert set(found["ambient"]) == set(found["inheritable"]) == ambient


@pytest.mark.parametrize("field", ["add_capabilities", "drop_capabilities", "ambient_capabilities"])
def test_what_is_no_capability_is_refused(field: str) -> None:
    asked: dict[str, Any] = {field: ("FLY",)}
    with pytest.raises(InvalidArgumentError, match="'FLY' is not a capability"):
        build(security=Security(**asked))


def test_capabilities_that_the_node_does_not_have_are_left_out() -> None:
    security = Security(add_capabilities=("BPF", "SYS_ADMIN"), ambient_capabilities=("perfmon",))
    found = build(security=security)["process"]["capabilities"]
    assert set(found["bounding"]) == {*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"}
    assert found["ambient"] == []
    config = dataclasses.replace(CONFIG, security=security)
    assert lacking(config, HOST) == ["CAP_BPF", "CAP_PERFMON"]
    dropped = build(security=Security(drop_capabilities=("BPF",)))["process"]["capabilities"]
    assert set(dropped["bounding"]) == set(DEFAULT_CAPABILITIES)


@pytest.mark.parametrize(
    ("source", "propagation", "has"),
    [
        ("/dev", Propagation.PRIVATE, True),
        ("/dev", Propagation.HOST_TO_CONTAINER, True),
        ("/dev", Propagation.BIDIRECTIONAL, False),  # the mount would appear on the node
        ("/volume", Propagation.PRIVATE, False),  # the runtime would make a directory in it
    ],
)
def test_a_container_with_the_nodes_dev_has_the_pods_shared_memory(
    source: str, propagation: Propagation, has: bool
) -> None:
    dev = Mount("/dev", source, readonly=False, propagation=propagation)
    places = [m["destination"] for m in build(mounts=(dev,))["mounts"]]
    assert ("/dev/shm" in places) is has
    assert not {"/dev/pts", "/dev/mqueue"} & set(places)
    assert places.count("/dev") == 1


def test_dev_shm_of_the_node_keeps_its_mount_flags() -> None:
    def options(ipc: NamespaceMode) -> list[str]:
        mounts = build(namespaces=Namespaces(ipc=ipc))["mounts"]
        return next(m["options"] for m in mounts if m["destination"] == "/dev/shm")

    assert options(NamespaceMode.NODE) == ["bind"]
    assert {"nosuid", "nodev", "noexec"} < set(options(NamespaceMode.POD))


def test_the_oom_score_is_no_lower_than_the_daemon_may_set() -> None:
    def score(asked: int) -> int:
        return build(resources=Resources(oom_score_adj=asked))["process"]["oomScoreAdj"]

    assert [score(-998), score(-500), score(3), score(1000)] == [-500, -500, 3, 1000]


def test_resources_that_are_unset_are_not_in_the_spec() -> None:
    limits = build()["linux"]["resources"]
    assert set(limits) == {"devices"}
    limits = build(resources=Resources(cpu_shares=2, memory_limit=5, hugepage_limits=(("2MB", 7),)))["linux"][
        "resources"
    ]
    assert limits["cpu"] == {"shares": 2}
    assert limits["memory"] == {"limit": 5}
    swap = dataclasses.replace(HOST, swap_accounting=True)
    assert build(resources=Resources(memory_limit=5), host=swap)["linux"]["resources"]["memory"] == {
        "limit": 5,
        "swap": 5,
    }
    both = Resources(memory_limit=5, memory_swap_limit=7)
    assert build(resources=both, host=swap)["linux"]["resources"]["memory"] == {"limit": 5, "swap": 7}
    assert limits["hugepageLimits"] == [{"pageSize": "2MB", "limit": 7}]


def test_devices_are_allowed_one_by_one() -> None:
    node = DeviceNode("/dev/x", "c", 10, 229, 0o20666, 0, 0)
    linux = build(nodes=[node], devices=(Device("/dev/x", "/dev/fuse", "rw"),))
    assert linux["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
    ]
    assert linux["linux"]["devices"][0]["fileMode"] == 0o666


def test_privileged_takes_the_confinement_off() -> None:
    found = build(security=Security(privileged=True, masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",)))
    assert found["linux"]["maskedPaths"] == found["linux"]["readonlyPaths"] == []
    assert found["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    options = {m["destination"]: m["options"] for m in found["mounts"]}
    assert "rw" in options["/sys"]
    assert "rw" in options["/sys/fs/cgroup"]


def test_a_writable_cgroup_leaves_sys_read_only() -> None:
    options = {m["destination"]: m["options"] for m in build(defaults=SpecDefaults(cgroup_writable=True))["mounts"]}
    assert "rw" in options["/sys/fs/cgroup"]
    assert "ro" in options["/sys"]


def test_an_execs_process_is_the_containers_with_another_command() -> None:
    document = build()
    process = spec.exec_process(document, ["ls"], tty=False)
    assert process["args"] == ["ls"]
    assert process["user"] == document["process"]["user"]
    assert document["process"]["args"] == ["run"]
    assert "TERM=xterm" in spec.exec_process(document, ["ls"], tty=True)["env"]


def test_labels_and_profiles() -> None:
    found = build(apparmor_profile="own", selinux_label="a:b:c:d", mount_label="a:o:f:d")
    assert found["process"]["apparmorProfile"] == "own"
    assert found["process"]["selinuxLabel"] == "a:b:c:d"
    assert found["linux"]["mountLabel"] == "a:o:f:d"
    plain = build(security=Security(apparmor="own"))  # what is asked for is decided elsewhere
    assert not {"apparmorProfile", "selinuxLabel"} & plain["process"].keys()


def test_the_limit_of_descriptors() -> None:
    assert "rlimits" not in build()["process"]
    limited = build(host=dataclasses.replace(HOST, open_files=(1024, 4096)))
    assert limited["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}]


SWAP = dataclasses.replace(HOST, swap_accounting=True)


@pytest.mark.parametrize(
    ("asked", "host", "expected"),
    [
        ({"memory_limit": 5}, SWAP, {"memory_limit": 5, "memory_swap_limit": 5}),
        ({"memory_limit": 5, "memory_swap_limit": 7}, SWAP, {"memory_limit": 5, "memory_swap_limit": 7}),
        ({"memory_limit": 5, "memory_swap_limit": -1}, SWAP, {"memory_limit": 5, "memory_swap_limit": -1}),
        ({"memory_limit": 5, "memory_swap_limit": 7}, HOST, {"memory_limit": 5}),
        ({"memory_limit": 5}, HOST, {"memory_limit": 5}),
        ({"cpu_quota": 7}, HOST, {"cpu_quota": 7, "cpu_period": 100_000}),
        ({"oom_score_adj": -998}, HOST, {"oom_score_adj": -500}),
        ({"hugepage_limits": (("2MB", 4), ("1GB", 8))}, HOST, {"hugepage_limits": (("2MB", 4),)}),
    ],
)
def test_the_limits_that_a_node_enforces(asked: dict[str, Any], host: HostFacts, expected: dict[str, Any]) -> None:
    assert in_force(Resources(**asked), host) == Resources(**expected)


def test_the_limits_that_a_node_cannot_enforce_are_told() -> None:
    asked = Resources(
        memory_limit=5, memory_swap_limit=7, hugepage_limits=(("2MB", 4), ("1GB", 8), ("64KB", 0), ("16GB", 9))
    )
    assert unenforced(asked, HOST) == {"memory_swap_limit_in_bytes": "7", "hugepage_limits": "1GB = 8, 16GB = 9"}
    assert unenforced(dataclasses.replace(asked, hugepage_limits=()), SWAP) == {}
    assert resource_limits(asked, HOST) == {"memory": {"limit": 5}, "hugepageLimits": [{"pageSize": "2MB", "limit": 4}]}


def test_a_quota_has_its_period_by_name() -> None:
    assert resource_limits(Resources(cpu_quota=30_000), HOST)["cpu"] == {"quota": 30_000, "period": 100_000}
    given = Resources(cpu_quota=30_000, cpu_period=50_000)
    assert resource_limits(given, HOST)["cpu"] == {"quota": 30_000, "period": 50_000}
    assert "period" not in resource_limits(Resources(cpu_shares=512), HOST)["cpu"]


@pytest.mark.parametrize(("swap", "left"), [(0, "0"), (64, "0"), (80, "16"), (-1, "max")])
def test_version_2_is_told_swap_alone(swap: int, left: str) -> None:
    host = dataclasses.replace(HOST, unified_cgroups=True, swap_accounting=True)
    found = resource_limits(Resources(memory_limit=64, memory_swap_limit=swap), host)
    assert found == {"memory": {"limit": 64}, "unified": {"memory.swap.max": left}}
    asked = Resources(memory_limit=64, memory_swap_limit=swap, unified={"memory.swap.max": "7"})
    assert resource_limits(asked, host)["unified"] == {"memory.swap.max": "7"}


def test_mounts_of_the_node_and_of_a_base_are_replaced_by_those_of_the_pod() -> None:
    cgroup = {"destination": "/sys/fs/cgroup/", "type": "cgroup", "source": "cgroup", "options": ["ro", "noexec"]}
    left_out = [{"destination": path, "type": "tmpfs"} for path in ("/run", "/dev/shm", "/etc/hosts")]
    defaults = SpecDefaults(mounts=(("/n/a", "/a"), ("/n/b", "/b")), base={"mounts": [cgroup, *left_out]})
    own = Mount("/b", "/pod/b", readonly=False, propagation=Propagation.PRIVATE)
    for privileged, access in ((False, "ro"), (True, "rw")):
        security = dataclasses.replace(CONFIG.security, privileged=privileged)
        mounts = build(defaults=defaults, mounts=(own,), security=security)["mounts"]
        found = {m["destination"]: m for m in mounts}
        assert len(found) == len(mounts)
        assert {path: found[path]["source"] for path in ("/a", "/b", "/dev/shm", "/etc/hosts")} == {
            "/a": "/n/a",
            "/b": "/pod/b",
            "/dev/shm": "/s/shm",
            "/etc/hosts": "/s/hosts",
        }
        assert found["/sys/fs/cgroup/"]["options"] == [access, "noexec"]
        assert "/run" not in found


def test_limits_and_environment_of_the_base_win_over_those_of_the_node() -> None:
    base = {"process": {"rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}], "env": ["B=base"]}, "hooks": {}}
    defaults = SpecDefaults(
        rlimits={"RLIMIT_CORE": (0, 0), "RLIMIT_NOFILE": (3, 4)}, env=("A=node", "B=node", "C=node"), base=base
    )
    image = ImageDefaults(env=("C=image",))
    host = dataclasses.replace(HOST, open_files=(1, 2))
    found = build(image, host=host, defaults=defaults)
    assert {r["type"]: (r["soft"], r["hard"]) for r in found["process"]["rlimits"]} == {
        "RLIMIT_CORE": (1, 1),
        "RLIMIT_NOFILE": (3, 4),
    }
    assert {"A=node", "B=base", "C=image"} <= set(found["process"]["env"])
    assert found["hooks"] == {}


def test_the_daemons_own_mounts_are_where_the_links_of_the_image_lead() -> None:
    base = {
        "mounts": [{"destination": path, "type": "bind", "source": "/s"} for path in ("/run", "/x/", "/dev/shm", "/")]
    }
    defaults = SpecDefaults(mounts=(("/outside", "/inside"),), base=base)
    paths = own_paths(defaults)
    assert paths == ("/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/inside", "/x")
    real_paths = {path: f"/real{path}" for path in paths}
    hosts = Mount("/real/etc/hosts", "/kubelet/hosts", False, Propagation.PRIVATE)
    made = build(defaults=defaults, real_paths=real_paths, mounts=(hosts,))["mounts"]
    sources = {m["destination"]: m["source"] for m in made}
    assert sources["/real/etc/hosts"] == "/kubelet/hosts"
    assert (sources["/real/etc/hostname"], sources["/real/inside"], sources["/real/x"]) == (
        POD.hostname_file,
        "/outside",
        "/s",
    )
    assert not {"/etc/hosts", "/etc/hostname", "/inside", "/x"} & sources.keys()
