"""Facts of this host that containers depend on: AppArmor, limits, capabilities, the OOM score, device nodes."""

from __future__ import annotations

import os
import resource
import stat
import sys
from collections.abc import Iterator
from functools import cache

from criserver.errors import InvalidArgumentError, exhaustion
from criserver.oci.capabilities import CAPABILITIES
from criserver.oci.spec_inputs import DeviceNode, HostFacts
from criserver.stats.huge_pages import huge_page_sizes

_APPARMOR_SWITCH = "/sys/module/apparmor/parameters/enabled"
_APPARMOR_PROFILES = "/sys/kernel/security/apparmor/profiles"
# The most entries of a directory that is requested as a device, with all below it. A large /dev has some hundred.
_MAX_DEVICE_ENTRIES = 4096

# Entries of /dev that a privileged container does not get from the host: it has its own, or only the host uses them.
_OWN_DEVICES = frozenset({"pts", "shm", "fd", "mqueue", "console", "ptmx", ".lxc", ".lxd-mounts"})


def apparmor_profiles() -> frozenset[str] | None:
    """The names of the loaded AppArmor profiles; None if the kernel does not enforce AppArmor.

    Raises OSError if the node has no descriptors or memory left, which says nothing of the kernel.
    """
    try:
        with open(_APPARMOR_SWITCH) as f:
            if f.read().strip() != "Y":
                return None
        with open(_APPARMOR_PROFILES, errors="surrogateescape") as f:  # a profile may have a program's path as its name
            return frozenset(line.rpartition(" (")[0] for line in f)
    except OSError as e:
        if exhaustion(e):
            raise
        return None


@cache
def open_files() -> tuple[int, int]:
    """The soft and hard limit of open files that the daemon was started with. Containers get the same limits.

    The soft limit is low because of programs that use select(2), or loop over all possible descriptors.
    """
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_open_files() -> None:
    """Raise the daemon's own soft limit of open files to the hard limit."""
    _, hard = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@cache
def facts() -> HostFacts:
    """The host's facts, read once.

    Without CAP_SYS_RESOURCE the kernel refuses an OOM score below the writer's own (proc(5), oom_score_adj), and runc
    then ends without a message. So the daemon's own score is the lowest that containers get in this case.
    """
    bounding = _status_mask("CapBnd")
    known = tuple(name for bit, name in enumerate(CAPABILITIES) if bounding >> bit & 1)
    floor = -1000
    if not _status_mask("CapEff") >> CAPABILITIES.index("CAP_SYS_RESOURCE") & 1:
        with open("/proc/self/oom_score_adj") as f:
            floor = int(f.read())
    return HostFacts(
        capabilities=known,
        open_files=open_files(),
        oom_score_adj_floor=floor,
        unified_cgroups=os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
        swap_accounting=_has_swap_accounting(),
        hugepage_sizes=frozenset(huge_page_sizes() if _can_limit_hugepages() else ()),
        resctrl=os.path.exists("/sys/fs/resctrl/schemata"),
    )


def _can_limit_hugepages() -> bool:
    try:
        with open("/sys/fs/cgroup/cgroup.controllers") as f:
            return "hugetlb" in f.read().split()
    except FileNotFoundError:
        return os.path.isdir("/sys/fs/cgroup/hugetlb")


def _has_swap_accounting() -> bool:
    """Whether the kernel counts swap for each cgroup: version 1 shows it in all cgroups, version 2 not in the root."""
    if os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"):
        return True
    with open("/proc/self/cgroup") as f:
        own = next((line.rstrip("\n")[3:] for line in f if line.startswith("0::")), "")
    return os.path.exists(f"/sys/fs/cgroup{own}/memory.swap.max")


def _status_mask(field: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1], 16)
    return 0


def device_nodes(host_path: str, container_path: str) -> dict[str, DeviceNode]:
    """The host's node at ``host_path``, by its path on the host, for ``container_path``. Blocks.

    Of a directory these are all nodes in it and below it, for the same paths below ``container_path``. Raises
    InvalidArgumentError for a path that does not exist, for one that is neither a device node nor a directory, and for
    a directory with more than 4096 entries.
    """
    try:
        status = os.stat(host_path)
        if stat.S_ISDIR(status.st_mode):
            top = os.path.realpath(host_path)
            return {
                path: _node(found, container_path.rstrip("/") + path[len(top.rstrip("/")) :])
                for path, found in _nodes_below(top, _MAX_DEVICE_ENTRIES)
            }
    except OSError as e:
        raise InvalidArgumentError(f"device {host_path}: {e.strerror}") from e
    if not _is_node(status):
        raise InvalidArgumentError(f"device {host_path} is neither a device node nor a directory of device nodes")
    return {host_path: _node(status, container_path)}


def all_devices() -> list[DeviceNode]:
    """Every device node of the host's /dev, for a privileged container."""
    return [_node(status, path) for path, status in _nodes_below("/dev", sys.maxsize)]


def _nodes_below(top: str, most: int) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of each device node below a directory. No link is followed, and no directory twice.

    What is removed meanwhile is left out. Raises OSError, and InvalidArgumentError for a directory with more than
    ``most`` entries.
    """
    pending, entries_seen = [top], 0
    while pending:
        try:
            directory = os.scandir(path := pending.pop())
        except FileNotFoundError:
            if path == top:
                raise
            continue  # it goes with the last device in it
        with directory as entries:
            for entry in entries:
                entries_seen += 1
                if entries_seen > most:
                    raise InvalidArgumentError(f"device {top} is a directory with more than {most} entries")
                if entry.name in _OWN_DEVICES:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # a device may be removed at any moment
                if _is_node(status):
                    yield entry.path, status


def _is_node(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)


def _node(status: os.stat_result, path: str) -> DeviceNode:
    return DeviceNode(
        path=path,
        kind="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def is_own_namespace(fd: int, kind: str) -> bool:
    """Whether a descriptor refers to the daemon's own namespace of this kind (namespaces(7), /proc/PID/ns)."""
    other, own = os.fstat(fd), os.stat(f"/proc/self/ns/{kind}")
    return (other.st_dev, other.st_ino) == (own.st_dev, own.st_ino)
