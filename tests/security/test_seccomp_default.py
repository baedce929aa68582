"""The default seccomp profile with a program that has every capability: only the filter stops it."""

from __future__ import annotations

import errno
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

import pytest

from criserver.oci import seccomp
from criserver.oci.capabilities import DEFAULT_CAPABILITIES
from tests.support import calls
from tests.support.bundles import Bundles

pytestmark = [
    pytest.mark.skipif(not shutil.which("runc") or not shutil.which("busybox"), reason="needs runc and busybox"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls below are x86_64's"),
]

GROUPS, FILTERS = seccomp.default_table()
EVERY_CAPABILITY = tuple({c for g in GROUPS if not isinstance(g.allow, str) for c in g.allow} | {*DEFAULT_CAPABILITIES})
# What the calls that are not allowed fail with.
REFUSED = {name: -getattr(errno, g.errno) for g in GROUPS if not g.allows(DEFAULT_CAPABILITIES) for name in g.syscalls}
# Of Linux 6.15 and newer: the headers may not have them.
NEWER = {"open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469}
# Those of them that no kernel refuses to a program with every capability: a few answer zero to arguments of zero.
DONE_WITHOUT_A_FILTER = (
    *(
        "mount",
        "umount2",
        "unshare",
        "setns",
        "pivot_root",
        "sethostname",
        "settimeofday",
        "open_by_handle_at",
        "fsopen",
    ),
    *("process_madvise", "move_pages", "add_key", "bpf", "set_mempolicy", "acct", "fanotify_init"),
)

# One process traces another and makes its harmless call into the one that is named by NUMBER.
TRACER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct user_regs_struct regs;
    int status, child = fork();
    if (!child) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0)) _exit(1);
        raise(SIGSTOP);
        syscall(SYS_getppid, 0, 0, 0, 0, 0);
        _exit(0);
    }
    waitpid(child, &status, 0);
    if (!WIFSTOPPED(status)) return 1;
    do {
        if (ptrace(PTRACE_SYSCALL, child, 0, 0)) return 2;
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status) || ptrace(PTRACE_GETREGS, child, 0, &regs)) return 3;
    } while (regs.orig_rax != SYS_getppid);
    regs.orig_rax = strtol(argv[1], 0, 0);
    if (ptrace(PTRACE_SETREGS, child, 0, &regs)) return 4;
    if (ptrace(PTRACE_SYSCALL, child, 0, 0)) return 5;
    waitpid(child, &status, 0);
    if (ptrace(PTRACE_GETREGS, child, 0, &regs)) return 6;
    printf("%ld\n", (long)regs.rax);
    kill(child, SIGKILL);
    return 0;
}
"""


@pytest.fixture(scope="module")
def bundles(nothing_left: None) -> Iterator[Bundles]:
    bundles = Bundles()
    try:
        calls.build_calls(bundles.rootfs / "bin/calls")
        calls.build(TRACER, bundles.rootfs / "bin/tracer")
        yield bundles
    finally:
        bundles.close()


def run(bundles: Bundles, args: Sequence[str], *, confined: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``args`` with every capability, and unless not ``confined`` with the filter of a container without any."""
    spec = bundles.spec(args, EVERY_CAPABILITY)
    if confined:
        spec["linux"]["seccomp"] = seccomp.default_profile(DEFAULT_CAPABILITIES, "amd64")
    return bundles.run(spec)


def answers(bundles: Bundles, made: Mapping[str, Sequence[object]], *, confined: bool = True) -> dict[str, int]:
    """What the kernel answers to each of the calls."""
    found = run(bundles, ["calls", *calls.arguments(list(made.values()))], confined=confined)
    assert found.returncode == 0, found
    lines = found.stdout.split()
    assert len(lines) == len(made)
    return dict(zip(made, map(int, lines), strict=True))


def refused(bits: int) -> dict[str, int]:
    """The numbers of the calls that are not allowed, of 64-bit or 32-bit x86."""
    found = {name: number for name, number in calls.numbers(bits).items() if name in REFUSED} | NEWER
    assert len(found) > 60
    return found


def test_every_call_that_is_not_allowed_is_refused(bundles: Bundles) -> None:
    numbers = refused(64)
    found = answers(bundles, {name: (number,) for name, number in numbers.items()})
    assert found == {name: REFUSED[name] for name in numbers}


def test_nor_by_the_door_of_32_bit_programs(bundles: Bundles) -> None:
    numbers = refused(32)
    found = answers(bundles, {name: ("x86", number) for name, number in numbers.items()})
    assert found == {name: REFUSED[name] for name in numbers}


def test_nor_by_that_of_x32(bundles: Bundles) -> None:
    """No such call reaches the kernel, be it allowed to others or not."""
    # CVE-2014-0038 was a hole of x32 alone.
    names = {**refused(64), "read": 0, "getppid": 110, "recvmmsg": 537, "execve": 520}
    found = answers(bundles, {name: (calls.X32 | number,) for name, number in names.items()})
    assert set(found.values()) == {calls.KILLED}


def test_nor_by_the_numbers_of_x32_without_its_sign(bundles: Bundles) -> None:
    """Linux before 5.4 took 512 to 547 from 64-bit programs too, with the arguments of 32-bit ones."""
    found = answers(bundles, {str(number): (number,) for number in range(512, 548)})
    assert set(found.values()) == {-errno.ENOSYS}


def test_it_is_the_filter_that_refuses(bundles: Bundles) -> None:
    numbers = calls.numbers(64)
    made = {name: (numbers[name],) for name in DONE_WITHOUT_A_FILTER}
    assert set(answers(bundles, made).values()) == {-errno.EPERM}
    assert -errno.EPERM not in answers(bundles, made, confined=False).values()


def test_what_is_allowed_reaches_the_kernel(bundles: Bundles) -> None:
    numbers = calls.numbers(64)
    names = (
        *("getppid", "ptrace", "process_vm_readv", "process_vm_writev", "process_mrelease", "name_to_handle_at"),
        *("fanotify_mark", "modify_ldt", "arch_prctl", "landlock_create_ruleset", "memfd_create", "memfd_secret"),
        *("futex_waitv", "prctl", "personality", "socket", "clone", "chroot", "openat2", "pidfd_open", "vmsplice"),
        *("statx", "mlock2", "copy_file_range", "io_setup", "mq_open", "adjtimex", "setresuid", "mknod"),
    )
    # clone: of a thread without the memory of its process, which the kernel does not make.
    made = {name: (numbers[name], 0x00010000 * (name == "clone")) for name in names}
    found = answers(bundles, made)
    assert found == answers(bundles, made, confined=False)
    assert -errno.EPERM not in found.values()


@pytest.mark.parametrize(("name", "expected"), [("unshare", -errno.EPERM), ("clone3", -errno.ENOSYS)])
def test_a_tracer_changes_a_call_in_vain(bundles: Bundles, name: str, expected: int) -> None:
    """Before Linux 4.8 the filter had seen the call already when the tracer put another in its place."""
    number = str(calls.numbers(64)[name])
    found = run(bundles, ["tracer", number])
    assert (found.returncode, found.stdout) == (0, f"{expected}\n")
    assert run(bundles, ["tracer", number], confined=False).stdout != found.stdout


def test_a_tracer_does_not_lift_the_filter(bundles: Bundles) -> None:
    """PTRACE_O_SUSPEND_SECCOMP, which checkpointing uses, is not for who is filtered, whatever his capabilities."""
    # PTRACE_SEIZE of the container's first process, which the caller is a child of.
    made = {"lift": (calls.numbers(64)["ptrace"], 0x4206, 1, 0, 1 << 21)}
    assert answers(bundles, made) == {"lift": -errno.EPERM}
    assert answers(bundles, made, confined=False) != {"lift": -errno.EPERM}
