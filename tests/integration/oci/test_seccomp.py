"""The default seccomp profile with a real runc: ordinary programs work, calls that reach out of a container fail."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from criserver.oci import seccomp
from criserver.oci.capabilities import DEFAULT_CAPABILITIES
from tests.support import calls
from tests.support.bundles import Bundles

pytestmark = [
    pytest.mark.skipif(not shutil.which("runc") or not shutil.which("busybox"), reason="needs runc and busybox"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls below are x86_64's"),
]

# All that a group of calls may need.
EVERY_CAPABILITY = tuple(
    sorted({c for g in seccomp.default_table()[0] if not isinstance(g.allow, str) for c in g.allow})
)

THREADS = r"""
#include <pthread.h>
#include <stdio.h>
static void *run(void *text) { puts(text); return 0; }
int main(void) {
    pthread_t thread;
    int error = pthread_create(&thread, 0, run, "a thread ran");
    if (!error) pthread_join(thread, 0);
    return error;
}
"""


@pytest.fixture(scope="module")
def bundles(nothing_left: None) -> Iterator[Bundles]:
    bundles = Bundles()
    try:
        yield bundles
    finally:
        bundles.close()


@pytest.fixture(scope="module")
def programs(bundles: Bundles) -> None:
    """`calls` and `threads` in the root file system."""
    calls.build_calls(bundles.rootfs / "bin/calls")
    calls.build(THREADS, bundles.rootfs / "bin/threads")


def run(
    bundles: Bundles,
    args: Sequence[str],
    capabilities: Sequence[str] = DEFAULT_CAPABILITIES,
    profile_of: Sequence[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``args`` under the default; ``profile_of`` are the capabilities that it is made for, if others."""
    spec = bundles.spec(args, capabilities)
    spec["linux"]["seccomp"] = seccomp.default_profile(capabilities if profile_of is None else profile_of, "amd64")
    return bundles.run(spec)


def call(bundles: Bundles, *words: object, capabilities: Sequence[str] = (), profile_of: Sequence[str] = ()) -> int:
    """What one system call returns, the profile made for ``profile_of``."""
    found = run(bundles, ["calls", *calls.arguments([words])], capabilities, profile_of)
    assert found.returncode == 0, found
    return int(found.stdout)


def test_ordinary_commands_work(bundles: Bundles) -> None:
    script = """
        set -e
        cd /tmp; echo text > a; cp a b; mv b c; ln -s c d; cat d | grep text; chown 1:1 a; chmod 600 a; stat -c %u a
        mkdir -p x/y; tar c x | tar t; dd if=/dev/zero of=z bs=1k count=8 2>/dev/null; sync; rm -r x z
        mkfifo f; (echo through > f &); cat f; mknod n c 1 3
        sleep 0.01; (sleep 100 & kill $!; wait); date +%s >/dev/null; df / >/dev/null; ps >/dev/null; id -u; uname -s
        hostname >/dev/null; nproc >/dev/null; setpriv --nnp true; renice -n 5 -p $$; timeout 5 true
        ulimit -n >/dev/null; ip addr >/dev/null; chroot / true; ionice -c 3 true; setsid true
        sleep 100 & kill -STOP $!; kill -KILL $!
        echo done
    """
    found = run(bundles, ["sh", "-c", script])
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[-2] == "done"
    assert "Function not implemented" not in found.stderr
    assert "Operation not permitted" not in found.stderr


@pytest.mark.parametrize(
    "command", ["unshare -U true", "unshare -m true", "mount -t tmpfs t /mnt", "umount /tmp", "hostname other", "dmesg"]
)
def test_the_filter_refuses_what_the_kernel_would_do(bundles: Bundles, command: str) -> None:
    # All capabilities in the process and none in the profile: without the filter each of these succeeds.
    everything = [*DEFAULT_CAPABILITIES, *EVERY_CAPABILITY]
    found = run(bundles, command.split(), everything, profile_of=[])
    assert found.returncode != 0
    assert "not permitted" in found.stderr or "permission denied" in found.stderr
    assert run(bundles, command.split(), everything).returncode == 0


def test_chroot_needs_its_capability(bundles: Bundles) -> None:
    found = run(bundles, ["chroot", "/", "true"], ["CAP_SYS_CHROOT"], profile_of=[])
    assert "Operation not permitted" in found.stderr
    assert run(bundles, ["chroot", "/", "true"], ["CAP_SYS_CHROOT"]).returncode == 0


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((110,), 1),  # getppid
        ((425, 1, 0), -errno.EPERM),  # io_uring_setup
        ((250, 0), -errno.EPERM),  # keyctl
        ((321, 0, 0, 0), -errno.EPERM),  # bpf
        ((304, 0, 0, 0), -errno.EPERM),  # open_by_handle_at
        ((246, 0, 0, 0), -errno.EPERM),  # kexec_load
        ((435, 0, 0), -errno.ENOSYS),  # clone3
        ((180,), -errno.ENOSYS),  # nfsservctl, gone from the kernel
        ((600,), -errno.ENOSYS),  # a call of the future
        ((56, 0x10000000 | 17, 0, 0, 0), -errno.EPERM),  # clone(CLONE_NEWUSER)
        ((56, 0x7E020011, 0, 0, 0), -errno.EPERM),  # clone with all of the namespaces
        ((135, 0xFFFFFFFF), 0),  # personality: which one?
        ((135, 0x40000), -errno.EPERM),  # ADDR_NO_RANDOMIZE
        ((135, 6), -errno.ENOSYS),  # PER_BSD
        ((41, 40, 1, 0), -errno.EAFNOSUPPORT),  # AF_VSOCK
        ((41, 1 << 32 | 40, 1, 0), -errno.EAFNOSUPPORT),
        ((41, 38, 5, 0), -errno.EAFNOSUPPORT),  # AF_ALG
        ((41, 1, 1, 0), 3),  # AF_UNIX
        ((41, 10, 1, 0), 3),  # AF_INET6
        (("x86", 64), 1),  # getppid of 32-bit programs
        (("x86", 21, 0, 0, 0), -errno.EPERM),  # their mount
        (("x86", 120, 0x10000000, 0, 0), -errno.EPERM),  # their clone
        (("x86", 359, 40, 1, 0), -errno.EAFNOSUPPORT),  # their socket
        (("x86", 359, 1, 1, 0), 3),
    ],
)
def test_single_calls(bundles: Bundles, words: tuple[object, ...], expected: int) -> None:
    assert call(bundles, *words) == expected


@pytest.mark.usefixtures("programs")
def test_a_capability_opens_its_group(bundles: Bundles) -> None:
    # Bad arguments, so that the kernel's own answer shows that the call has come through.
    for words, capability in (((321, 9999, 0, 0), "CAP_BPF"), ((435, 0, 0), "CAP_SYS_ADMIN")):
        assert call(bundles, *words, capabilities=[capability], profile_of=[capability]) == -errno.EINVAL


@pytest.mark.usefixtures("programs")
def test_calls_of_an_architecture_without_rules_kill(bundles: Bundles) -> None:
    assert call(bundles, calls.X32 | 39) == calls.KILLED  # getpid of x32


@pytest.mark.usefixtures("programs")
def test_threads_of_the_c_library(bundles: Bundles) -> None:
    found = run(bundles, ["threads"], capabilities=())
    assert (found.returncode, found.stdout) == (0, "a thread ran\n"), found.stderr


def test_python_of_the_host(bundles: Bundles) -> None:
    """A large dynamically linked program with threads, child processes, sockets, mmap, signals and timers."""
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        pytest.skip(f"{python} is not installed")
    script = """
import asyncio, ctypes, mmap, multiprocessing, os, resource, signal, socket, subprocess, tempfile, threading
threading.Thread(target=lambda: print("thread")).start()
assert subprocess.check_output(["/bin/echo", "child"]) == b"child\\n"
a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
socket.socket(socket.AF_INET).bind(("127.0.0.1", 0)); mmap.mmap(-1, 4096).close(); os.memfd_create("m")
signal.setitimer(signal.ITIMER_REAL, 10); os.sched_getaffinity(0); resource.getrlimit(resource.RLIMIT_NOFILE)
with tempfile.TemporaryFile() as f: f.write(b"x"); os.fsync(f.fileno()); os.posix_fallocate(f.fileno(), 0, 9)
async def main(): return await (await asyncio.create_subprocess_exec("/bin/true")).wait()
assert asyncio.run(main()) == 0
print("done")
"""
    spec = bundles.spec([python, "-c", script])
    for path in ("/usr", "/lib", "/lib64"):
        if not (bundles.rootfs / path[1:]).exists():
            (bundles.rootfs / path[1:]).mkdir()
        spec["mounts"].append(
            {"destination": path, "source": os.path.realpath(path), "type": "bind", "options": ["rbind", "ro"]}
        )
    spec["mounts"].append({"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"})
    spec["linux"]["seccomp"] = seccomp.default_profile((), "amd64")
    found = bundles.run(spec)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "thread\ndone\n"


def test_a_profile_file(bundles: Bundles, tmp_path: Path) -> None:
    path = tmp_path / "no-mkdir.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSPC}
    without = {"names": ["rmdir", "unlinkat"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_CHOWN"]}}
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule, without]}))
    for capabilities, message in (([], "Operation not permitted"), (["CAP_CHOWN"], "No such file")):
        spec = bundles.spec(["sh", "-c", "mkdir /tmp/x; rmdir /tmp/y"], capabilities)
        spec["linux"]["seccomp"] = seccomp.localhost_profile(str(path), capabilities, "amd64", os.uname().release)
        found = bundles.run(spec)
        assert "No space left" in found.stderr
        assert message in found.stderr
