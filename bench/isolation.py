"""Where a benchmark runs: namespaces of its own, so that nothing of it is left on the machine.

Interfaces, iptables rules, mounts, sockets in /run and processes end with these namespaces. Only cgroups do not: they
are removed afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

CGROUP = "/criserver-bench"
INSIDE = "--inside"

_UNSHARE = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child"]


def enter(arguments: list[str], module: str = "bench") -> int:
    """Run this program again in namespaces of its own, with ``INSIDE`` as its first argument; its exit code.

    catatonit is the namespace's init. It reaps the orphans of all contenders.
    """
    if os.geteuid() != 0:
        raise RuntimeError("must be run as root: it mounts, makes namespaces and starts containers")
    if any(_has_processes(hierarchy + CGROUP) for hierarchy in _hierarchies()):
        raise RuntimeError(f"there are processes in cgroups below {CGROUP}: wait for the other benchmark")
    _remove_cgroups()  # of a benchmark that was killed
    try:
        return subprocess.run(
            [*_UNSHARE, "catatonit", "--", sys.executable, "-m", module, INSIDE, *arguments], check=False
        ).returncode
    except KeyboardInterrupt:
        return 130
    finally:
        _remove_cgroups()


def run(module: str, parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], str]) -> None:
    """The main function of a program of its own: print the table that ``measure`` makes in these namespaces."""
    arguments = sys.argv[1:]
    inside = arguments[:1] == [INSIDE]
    options = parser.parse_args(arguments[1:] if inside else arguments)
    try:
        if not inside:
            sys.exit(enter(arguments, module))
        print(f"cores: {os.cpu_count()}, load: {os.getloadavg()[0]:.1f}")
        print(measure(options))
    except RuntimeError as e:
        sys.exit(f"{module}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """The path of a directory on a tmpfs, which is /run.

    Runtimes, plugins and kubelets have fixed paths in /run, /var/lib and /var/log. So all three are in memory.
    """
    subprocess.run(["mount", "--make-rshared", "/"], check=True)  # as systemd does it
    for directory in ("/run", "/var/lib", "/var/log"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755,size=90%", "bench", directory], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    yield tempfile.mkdtemp(prefix="cribench-", dir="/run")
    for name in os.listdir("/sys/class/net"):
        if name.startswith("veth"):
            print(f"left by a runtime: interface {name}", file=sys.stderr)


@contextlib.contextmanager
def disk(place: str, gibibytes: int = 8) -> Iterator[str]:
    """The path of an empty ext4. It is in a sparse file in memory."""
    root, image = f"{place}/root", f"{place}/disk"
    os.makedirs(root)
    with open(image, "wb") as f:
        f.truncate(gibibytes << 30)
    # All tables are written now, and not by a kernel thread during the measurement.
    options = ["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
        os.unlink(image)


def make_cgroup(name: str) -> None:
    """Make a cgroup, as an installer of nodes makes that of all pods."""
    for hierarchy in _hierarchies():
        os.makedirs(hierarchy + name, exist_ok=True)


def remove_cgroup(name: str) -> None:
    """Remove the cgroup of a pod, as a kubelet does after the pod. A cgroup that is not empty stays."""
    for hierarchy in _hierarchies():
        with contextlib.suppress(OSError):
            os.rmdir(hierarchy + name)


def _has_processes(top: str) -> bool:
    for directory, _, _ in os.walk(top):
        with open(f"{directory}/cgroup.procs") as file:
            if file.read():
                return True
    return False


def _remove_cgroups() -> None:
    """All cgroups of the benchmark. Those that the runtimes should have removed are named on standard error."""
    left = set()
    for hierarchy in _hierarchies():
        top = hierarchy + CGROUP
        for directory, _, _ in os.walk(top, topdown=False):
            name = directory.removeprefix(top)
            if name.count("/") > 2:  # those above are the contender's and the pod's
                left.add(name)
            _remove_emptied(directory)
    for name in sorted(left):
        print(f"left by a runtime: cgroup {CGROUP}{name}", file=sys.stderr)


def _remove_emptied(directory: str) -> None:
    """Remove a cgroup. Its processes were killed with their namespace, and may take a moment to end."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.rmdir(directory)
        except OSError as e:
            if e.errno != errno.EBUSY or time.monotonic() > deadline:
                print(f"a cgroup cannot be removed: {e}", file=sys.stderr)
                return None
        time.sleep(0.05)


def _hierarchies() -> list[str]:
    """Where cgroup hierarchies of either version are mounted."""
    with open("/proc/self/mountinfo") as f:
        return [line.split()[4] for line in f if line.partition(" - ")[2].startswith("cgroup")]
