"""The cgroups of pods and containers: their paths with both of runc's cgroup drivers, their processes, their removal.

A sandbox's cgroup parent shows which driver is used:

1. cgroupfs: the parent is a path. The cgroup of a container is PARENT/ID.
2. systemd: the parent ends in ".slice". The cgroup of a container is a scope in that slice, and systemd nests slices by
   the dashes in their names (systemd.slice(5)).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.runtime import service_manager
from criserver.text import quoted
from snapshotter import file_tree, mounts, removal

log = structlog.get_logger(__name__)

# The parent of the cgroups of pods for which the kubelet gives no cgroup parent.
OWN = "/criserver"
_PREFIX = "criserver"

# How often freezing is tried, how many checks follow each try, and the seconds between two checks.
_TRIES, _LOOKS, _LOOK = 50, 50, 0.002
# Seconds between two checks whether killed processes have ended.
_END_LOOK = 0.01
# Seconds for which the kernel may report a cgroup as busy after its last process has ended.
_EMPTYING = 1.0
# Errors of reading cgroup.procs that are no failure: the cgroup is gone, or it is threaded and the list of its parent
# has the processes (cgroup-v2, "Threads").
_NO_PROCESSES = frozenset({errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP})


def is_slice(parent: str) -> bool:
    """Whether a cgroup parent is a slice of systemd."""
    return parent.endswith(".slice")


def own_parent(driver: str, sandbox_id: str) -> str:
    """The cgroup parent of a sandbox for which the kubelet gives none; ``driver`` is "cgroupfs" or "systemd"."""
    return f"{_PREFIX}-{sandbox_id}.slice" if driver == "systemd" else f"{OWN}/{sandbox_id}"


def checked_parent(driver: str, parent: str) -> str:
    """The kubelet's cgroup parent, in the driver's form. Raises InvalidArgumentError if the driver cannot use it."""
    if (driver == "systemd") != is_slice(parent):
        kind = "a systemd slice" if is_slice(parent) else "no systemd slice"
        raise InvalidArgumentError(
            f"cgroup_parent = {quoted(parent)} is {kind}, and this runtime's cgroup driver is {driver}; give the "
            "kubelet's cgroupDriver and [runtime] cgroup_driver the same value"
        )
    return os.path.basename(parent) if driver == "systemd" else parent


def spec_path(parent: str, key: str) -> str:
    """The ``cgroupsPath`` of a spec for the container ``key`` (runtime specification, config-linux.md)."""
    return f"{parent}:{_PREFIX}:{key}" if is_slice(parent) else f"{parent}/{key}"


def path(parent: str, key: str) -> str:
    """The path of the cgroup of the container ``key`` below the root of each hierarchy."""
    return f"{pod_path(parent)}/{_PREFIX}-{key}.scope" if is_slice(parent) else f"{parent}/{key}"


def pod_path(parent: str) -> str:
    """The path of a pod's cgroup below the root of each hierarchy; for a-b.slice it is /a.slice/a-b.slice."""
    if not is_slice(parent):
        return parent
    parts = parent.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[:n])}.slice" for n in range(1, len(parts) + 1))


@cache
def roots() -> dict[str, str]:
    """The mount point of each cgroup hierarchy, by controller; "" stands for the unified hierarchy (cgroups(7))."""
    points: dict[str, str] = {}
    for mount in mounts.entries():
        if mount.kind == "cgroup2":
            points.setdefault("", mount.point)
        elif mount.kind == "cgroup":
            for option in mount.file_system_options:
                points.setdefault(option, mount.point)
    return points


def _processes_root() -> str:
    """The root of the hierarchy that lists the processes of a cgroup, and in which systemd has its slices."""
    return roots().get("pids") or roots().get("", "")


def oom_files(cgroup: str) -> list[str]:
    """The files that count OOM kills in a cgroup: v1's memory.oom_control, v2's memory.events."""
    points = roots()
    if "memory" in points:
        return [f"{points['memory']}{cgroup}/memory.oom_control"]
    return [f"{points['']}{cgroup}/memory.events"] if "" in points else []


def pod_events(parent: str) -> str:
    """The file that counts the OOM kills of a whole pod on version 2 with systemd, which may remove a container's file.

    "" otherwise: the container's own file is enough then.
    """
    points = roots()
    return f"{points['']}{pod_path(parent)}/memory.events" if is_slice(parent) and "memory" not in points else ""


def remove_own() -> None:
    """Remove the parent of our pods' cgroups if it is empty. Another daemon on the node may have pods in it."""
    for root in set(roots().values()):
        try:
            os.rmdir(root + OWN)
        except OSError:
            continue  # it is not empty, or gone; the next removal of a pod tries again


def own_slice() -> str:
    """The name of the slice around our pods' slices if systemd still has it and it is empty; else ""."""
    name = f"{_PREFIX}.slice"
    try:
        with os.scandir(f"{_processes_root()}/{name}") as entries:
            return "" if any(entry.is_dir(follow_symlinks=False) for entry in entries) else name
    except OSError:
        return ""


def exists(cgroup: str) -> bool:
    """Whether a cgroup exists in any hierarchy. Blocks while the kernel makes or removes other cgroups."""
    return any(os.path.isdir(root + cgroup) for root in set(roots().values()))


def make_empty(cgroup: str) -> None:
    """Make a cgroup in each hierarchy that has its parent; it may be there already. Blocks. Raises OSError."""
    for root in set(roots().values()):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.mkdir(root + cgroup, 0o755)


def find(keys: Collection[str]) -> dict[str, str]:
    """The paths of the cgroups of those containers whose keys are given and that have a cgroup, by key. Blocks."""
    names = {name: key for key in keys for name in (key, f"{_PREFIX}-{key}.scope")}
    found: dict[str, str] = {}
    top = os.open(_processes_root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place, entry in file_tree.walk(top):
            if entry.name in names and entry.is_dir(follow_symlinks=False):
                found.setdefault(names[entry.name], f"/{place.path_of(entry.name)}")
    finally:
        os.close(top)
    return found


async def clear(cgroup: str, key: str, limit: float) -> bool:
    """Kill the processes in the cgroup of the container ``key``, and remove it. Return False if there is no cgroup.

    An OCI runtime that was killed before it had written its state leaves both behind. A scope is removed by systemd,
    which is asked to stop it. Raises DeadlineExceededError if processes have not ended after ``limit`` seconds,
    CriError if the cgroup cannot be removed.
    """
    if not await asyncio.to_thread(exists, cgroup):
        return False
    if left := await asyncio.to_thread(end_processes, cgroup, limit):
        raise unkillable(key, left, limit)
    if not cgroup.endswith(".scope"):
        await asyncio.to_thread(remove, cgroup)
    elif await asyncio.to_thread(os.path.isdir, _processes_root() + cgroup):
        await service_manager.stop_unit(os.path.basename(cgroup))
    return True


def unkillable(key: str, pids: Sequence[int], seconds: float) -> DeadlineExceededError:
    """The error for processes of a container that have not ended after SIGKILL."""
    listed = ", ".join(map(str, pids))
    return DeadlineExceededError(
        f"processes of {key} have not ended {seconds:g} s after SIGKILL; the kernel holds them: PID {listed}"
    )


async def remove_pod(parent: str) -> None:
    """Remove the cgroup that the daemon made for a pod; it may be gone already. Raises CriError if this fails."""
    if is_slice(parent):
        await service_manager.stop_unit(parent)
    else:
        await asyncio.to_thread(remove, parent)


def remove(cgroup: str) -> None:
    """Remove a cgroup and its descendants from every hierarchy; they may be gone already. Blocks.

    Raises CriError if one cannot be removed: nothing else would show that it is left.
    """
    deadline = time.monotonic() + _EMPTYING
    while failure := _try_removal(cgroup):
        if time.monotonic() > deadline:
            reason = "there are processes in it" if failure.errno == errno.EBUSY else str(failure)
            raise CriError(f"cgroup {cgroup} cannot be removed: {reason}")
        time.sleep(_END_LOOK)


def _try_removal(cgroup: str) -> OSError | None:
    """Try to remove a cgroup from each hierarchy. Return the last error, or None if it is gone from all of them."""
    failure = None
    for root in set(roots().values()):
        try:
            above = os.open(root + os.path.dirname(cgroup), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as e:
            failure = e
            continue
        try:
            removal.remove(above, os.path.basename(cgroup), files=False)
        except OSError as e:
            failure = e
        finally:
            os.close(above)
    return failure


def processes(cgroup: str) -> list[int]:
    """The PIDs in a cgroup and its descendants, from the pids or the unified hierarchy; none if the cgroup is gone.

    With the systemd driver crun puts a container into a child cgroup of its scope, and containers may make more.
    """
    pids, failure = _find_processes(cgroup)
    if failure is not None:
        log.warning("not all cgroups of a container can be read", cgroup=cgroup, error=str(failure))
    return pids


def _find_processes(cgroup: str) -> tuple[list[int], OSError | None]:
    """The PIDs as :func:`processes` returns them, and the error if the list may be incomplete."""
    pids: list[int] = []
    try:
        top = os.open(f"{_processes_root()}{cgroup}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return pids, None
    except OSError as e:
        return pids, e
    failure = None
    try:
        for place, entry in file_tree.walk(top):
            if entry.name == "cgroup.procs":
                try:
                    with open(os.open(entry.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=place.fd)) as f:
                        pids += map(int, f)
                except OSError as e:
                    if e.errno not in _NO_PROCESSES:
                        failure = e
    except OSError as e:
        failure = e
    finally:
        os.close(top)
    return pids, failure


def end_processes(cgroup: str, limit: float) -> list[int]:
    """Kill the processes in a cgroup and its descendants. Return those still there after ``limit`` seconds. Blocks.

    Raises CriError if the cgroups cannot be read, so that processes may be left.
    """
    deadline = time.monotonic() + limit
    while True:
        pids, failure = _find_processes(cgroup)
        if not pids and failure is None:
            return []
        if time.monotonic() > deadline:
            if failure is not None:
                raise CriError(f"cannot see whether all processes in cgroup {cgroup} have ended: {failure}")
            return pids
        thaw(cgroup)  # a frozen process takes no signal
        _kill(cgroup, pids)
        time.sleep(_END_LOOK)


def _kill(cgroup: str, pids: list[int]) -> None:
    """Kill these processes if they are still in the cgroup.

    Each PID is opened first and looked up in the cgroup afterwards: it may belong to another process by now.
    """
    opened: dict[int, int] = {}
    try:
        for pid in set(pids):  # a process that moves is listed twice
            with contextlib.suppress(OSError):  # it has ended; if not, the caller's next round finds it again
                opened[pid] = os.pidfd_open(pid)
        for pid in opened.keys() & set(processes(cgroup)):
            with contextlib.suppress(ProcessLookupError):
                sys.audit("criserver.pidfd_send_signal", pid, signal.SIGKILL)
                signal.pidfd_send_signal(opened[pid], signal.SIGKILL)
    finally:
        for pidfd in opened.values():
            os.close(pidfd)


@dataclass(frozen=True, slots=True)
class _Freezer:
    """The files of a cgroup's freezer: version 1 (kernel, cgroup-v1/freezer-subsystem), version 2 (cgroup-v2, Core).

    ``switch`` takes ``on`` to freeze and ``off`` to thaw. ``state`` contains ``frozen`` as soon as all processes are
    frozen. ``self_state`` is 0 unless this cgroup itself is to be frozen, whatever its parents are.
    """

    switch: str
    on: str
    off: str
    state: str
    frozen: str
    self_state: str


def _freezer(cgroup: str) -> _Freezer:
    points = roots()
    if "freezer" in points:
        files = f"{points['freezer']}{cgroup}/freezer"
        return _Freezer(f"{files}.state", "FROZEN", "THAWED", f"{files}.state", "FROZEN", f"{files}.self_freezing")
    files = f"{points.get('', '')}{cgroup}/cgroup"
    return _Freezer(f"{files}.freeze", "1", "0", f"{files}.events", "frozen 1", f"{files}.freeze")


def freeze(cgroup: str, wait: Callable[[float], None]) -> None:
    """Freeze all processes of a cgroup: none of them runs on return. Blocks.

    The caller must thaw the cgroup afterwards, also after an error. ``wait`` sleeps for a number of seconds; it raises
    an error to end the attempt. Raises FailedPreconditionError if the cgroup is gone, or has a process that cannot be
    frozen.
    """
    freezer = _freezer(cgroup)
    try:
        for _ in range(_TRIES):
            _write(freezer.switch, freezer.on)
            for _ in range(_LOOKS):
                if freezer.frozen in _read(freezer.state):
                    return
                wait(_LOOK)
            # Version 1 stays in the state FREEZING if a process was forking at that moment. A second try helps.
            _write(freezer.switch, freezer.off)
            wait(_LOOK)
    except OSError as e:
        raise FailedPreconditionError(f"cgroup {cgroup} cannot be frozen: {e.strerror}") from e
    raise FailedPreconditionError(f"cgroup {cgroup} cannot be frozen: a process in it does not stop")


def thaw(cgroup: str) -> None:
    """Let all processes of a cgroup run again. It may be gone, or not frozen. Raises CriError, OSError. Blocks."""
    freezer = _freezer(cgroup)
    try:
        _write(freezer.switch, freezer.off)
        thawed = _read(freezer.self_state).strip() == "0"
    except OSError as e:
        # ENODEV: the cgroup was removed after its file was opened.
        if e.errno in (errno.ENOENT, errno.ENODEV):
            return
        raise
    if not thawed:
        raise CriError(f"cgroup {cgroup} cannot be thawed: another program freezes it again at once")


def limit_huge_pages(cgroup: str, limits: Iterable[Mapping[str, Any]]) -> Callable[[], None]:
    """Set ``hugepageLimits`` of LinuxResources, for pages in use and reserved ones. Returns what undoes it. Blocks.

    Raises OSError where the kernel refuses a limit, as it does below the present use. Nothing has changed then.
    """
    points = roots()
    names = ("limit_in_bytes", "rsvd.limit_in_bytes") if "hugetlb" in points else ("max", "rsvd.max")
    directory = (points.get("hugetlb") or points.get("", "")) + cgroup
    before: dict[str, str] = {}

    def undo() -> None:
        for path, value in before.items():
            with contextlib.suppress(OSError):  # the container has ended, or uses more by now
                _write(path, value)

    try:
        for one in limits:
            for name in names:
                path = f"{directory}/hugetlb.{one['pageSize']}.{name}"
                # A kernel before 5.7 has no limits of what is reserved. The cgroup may go at any time.
                with contextlib.suppress(FileNotFoundError):
                    value = _read(path).strip()
                    _write(path, str(one["limit"]))
                    before.setdefault(path, value)
    except OSError as e:
        undo()
        if e.errno != errno.ENODEV:
            raise
    return undo


def _read(path: str) -> str:
    with open(path) as f:
        return f.read()


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
