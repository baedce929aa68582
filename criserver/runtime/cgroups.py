"""Where pods and containers are in the cgroup hierarchies, by both of runc's drivers, and what is read there.

A sandbox's cgroup parent tells the driver: one that ends in ".slice" is systemd's. With the cgroupfs driver a
container's cgroup is its ID below the parent; with systemd's it is a scope in the parent slice, and systemd keeps
slices in each other by the dashes in their names (systemd.slice(5)).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.runtime import service_manager
from criserver.text import quoted
from snapshotter import file_tree, removal

log = structlog.get_logger(__name__)

# Where pods are put that the kubelet gives no cgroup parent.
OWN = "/criserver"
_PREFIX = "criserver"

# How often freezing is tried, how often it is looked each time whether it is done, and the seconds between.
_TRIES, _LOOKS, _LOOK = 50, 50, 0.002
# Seconds between two looks whether killed processes have ended.
_END_LOOK = 0.01
# Seconds that a cgroup may still be in use after its last process has been seen to end.
_EMPTYING = 1.0
# Of a list of processes: the cgroup is gone, or is of threads, which its parent's list has (cgroup-v2, "Threads").
_NO_PROCESSES = frozenset({errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP})


def is_slice(parent: str) -> bool:
    """Whether a cgroup parent is systemd's."""
    return parent.endswith(".slice")


def own_parent(driver: str, sandbox_id: str) -> str:
    """The cgroup parent of a sandbox that the kubelet gives none; ``driver`` is "cgroupfs" or "systemd"."""
    return f"{_PREFIX}-{sandbox_id}.slice" if driver == "systemd" else f"{OWN}/{sandbox_id}"


def checked_parent(driver: str, parent: str) -> str:
    """The cgroup parent that the kubelet gives, where the driver can use it. Raises InvalidArgumentError."""
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
    """The cgroup of the container ``key`` below the roots of the hierarchies."""
    return f"{pod_path(parent)}/{_PREFIX}-{key}.scope" if is_slice(parent) else f"{parent}/{key}"


def pod_path(parent: str) -> str:
    """The cgroup of a pod below the roots: for a-b.slice that is /a.slice/a-b.slice."""
    if not is_slice(parent):
        return parent
    words = parent.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(words[:n])}.slice" for n in range(1, len(words) + 1))


@cache
def roots() -> dict[str, str]:
    """Where each cgroup hierarchy is mounted, by controller; "" is the unified one (cgroups(7))."""
    found: dict[str, str] = {}
    with open("/proc/self/mountinfo") as f:
        for line in f:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            point = before.split()[4]
            if kind == "cgroup2":
                found.setdefault("", point)
            elif kind == "cgroup":
                for option in options.split(","):
                    found.setdefault(option, point)
    return found


def _processes_root() -> str:
    """The hierarchy that tells which processes are in a cgroup, and that systemd has its slices in."""
    return roots().get("pids") or roots().get("", "")


def oom_files(cgroup: str) -> list[str]:
    """The files that count OOM kills in a cgroup: v1's memory.oom_control, v2's memory.events."""
    found = roots()
    if "memory" in found:
        return [f"{found['memory']}{cgroup}/memory.oom_control"]
    return [f"{found['']}{cgroup}/memory.events"] if "" in found else []


def pod_events(parent: str) -> str:
    """The file that counts the OOM kills of a whole pod, where systemd may take away those of a container; else ""."""
    found = roots()
    return f"{found['']}{pod_path(parent)}/memory.events" if is_slice(parent) and "memory" not in found else ""


def remove_own() -> None:
    """Remove what our pods' cgroups are in, where nobody has any there: another daemon on the node may."""
    for root in set(roots().values()):
        try:
            os.rmdir(root + OWN)
        except OSError:
            continue  # it is not empty, or gone; the next pod to go tries again


def own_slice() -> str:
    """The slice that our pods' own slices are in, where systemd still has it and nobody has any there; else ""."""
    name = f"{_PREFIX}.slice"
    try:
        with os.scandir(f"{_processes_root()}/{name}") as entries:
            return "" if any(entry.is_dir(follow_symlinks=False) for entry in entries) else name
    except OSError:
        return ""


def exists(cgroup: str) -> bool:
    """Whether a cgroup is there in any hierarchy."""
    return any(os.path.isdir(root + cgroup) for root in set(roots().values()))


async def remove_container(parent: str, key: str) -> None:
    """Remove the cgroup of a container that has no process; systemd's scopes are its own to remove.

    Raises CriError where it stays.
    """
    if not is_slice(parent):
        await asyncio.to_thread(remove, path(parent, key))
    elif os.path.isdir(_processes_root() + path(parent, key)):
        await service_manager.stop_unit(os.path.basename(path(parent, key)))


async def clear(parent: str, key: str, limit: float) -> bool:
    """End what is in the cgroup of the container ``key``, and remove the cgroup; False where there was none.

    An OCI runtime that was ended before it had written its state leaves both. Raises DeadlineExceededError where
    processes have not ended after ``limit`` seconds, CriError where the cgroup stays.
    """
    cgroup = path(parent, key)
    if not exists(cgroup):
        return False
    if left := await asyncio.to_thread(end_processes, cgroup, limit):
        raise unkillable(key, left, limit)
    await remove_container(parent, key)
    return True


def unkillable(key: str, pids: Sequence[int], seconds: float) -> DeadlineExceededError:
    """The error for processes of a container that have not ended after SIGKILL."""
    listed = ", ".join(map(str, pids))
    return DeadlineExceededError(
        f"processes of {key} have not ended {seconds:g} s after SIGKILL; the kernel holds them: PID {listed}"
    )


async def remove_pod(parent: str) -> None:
    """Remove the cgroup that we gave a pod; one that is gone is no error. Raises CriError where it stays."""
    if is_slice(parent):
        await service_manager.stop_unit(parent)
    else:
        await asyncio.to_thread(remove, parent)


def remove(cgroup: str) -> None:
    """Remove a cgroup and those below it from every hierarchy; one that is gone is no error. Blocks.

    Raises CriError where one stays: nothing else would know of it any more.
    """
    deadline = time.monotonic() + _EMPTYING
    while failure := _removal_failure(cgroup):
        if time.monotonic() > deadline:
            words = "there are processes in it" if failure.errno == errno.EBUSY else str(failure)
            raise CriError(f"cgroup {cgroup} cannot be removed: {words}")
        time.sleep(_END_LOOK)


def _removal_failure(cgroup: str) -> OSError | None:
    """Remove a cgroup wherever it can be; the last of what hindered it elsewhere."""
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
    """The PIDs in a cgroup and all below it, as its pids or unified hierarchy has them; none where it is gone.

    Under systemd crun puts a container into a cgroup of its own in the scope, and containers may make more.
    """
    pids, failure = _look_for_processes(cgroup)
    if failure is not None:
        log.warning("a container's cgroups are not all read", cgroup=cgroup, error=str(failure))
    return pids


def _look_for_processes(cgroup: str) -> tuple[list[int], OSError | None]:
    """As :func:`processes`, and what hindered the looking where these may not be all."""
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
    """Kill all that is in a cgroup and below it; what has not ended after ``limit`` seconds. Blocks.

    Raises CriError where it cannot be seen whether something is left.
    """
    deadline = time.monotonic() + limit
    while True:
        pids, failure = _look_for_processes(cgroup)
        if not pids and failure is None:
            return []
        if time.monotonic() > deadline:
            if failure is not None:
                raise CriError(f"cannot see whether all processes in cgroup {cgroup} have ended: {failure}")
            return pids
        thaw(cgroup)  # what is frozen takes no signal
        _kill(cgroup, pids)
        time.sleep(_END_LOOK)


def _kill(cgroup: str, pids: list[int]) -> None:
    """Kill those processes that are in the cgroup: opened first and looked up again, so that none is another."""
    opened: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended; any other is met again at the next look
                opened[pid] = os.pidfd_open(pid)
        for pid in opened.keys() & set(processes(cgroup)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(opened[pid], signal.SIGKILL)
    finally:
        for pidfd in opened.values():
            os.close(pidfd)


@dataclass(frozen=True, slots=True)
class _Freezer:
    """The files of a cgroup's freezer: version 1 (kernel, cgroup-v1/freezer-subsystem), version 2 (cgroup-v2, Core).

    ``state`` has the words ``reached`` in it once every process is frozen; ``asked`` is 0 once it is to be thawed.
    """

    switch: str
    on: str
    off: str
    state: str
    reached: str
    asked: str


def _freezer(cgroup: str) -> _Freezer:
    found = roots()
    if "freezer" in found:
        files = f"{found['freezer']}{cgroup}/freezer"
        return _Freezer(f"{files}.state", "FROZEN", "THAWED", f"{files}.state", "FROZEN", f"{files}.self_freezing")
    files = f"{found.get('', '')}{cgroup}/cgroup"
    return _Freezer(f"{files}.freeze", "1", "0", f"{files}.events", "frozen 1", f"{files}.freeze")


def freeze(cgroup: str, wait: Callable[[float], None]) -> None:
    """Freeze all processes of a cgroup: when it returns, none of them runs. Blocks.

    ``wait`` sleeps so many seconds, and raises what is to end the attempt. Raises FailedPreconditionError for a cgroup
    that is gone, or that has a process that cannot be frozen. However it ends, the cgroup is to be thawed.
    """
    freezer = _freezer(cgroup)
    try:
        for _ in range(_TRIES):
            _write(freezer.switch, freezer.on)
            for _ in range(_LOOKS):
                if freezer.reached in _read(freezer.state):
                    return
                wait(_LOOK)
            # Version 1 stays at FREEZING where a process was forking just then; from anew it gets there.
            _write(freezer.switch, freezer.off)
            wait(_LOOK)
    except OSError as e:
        raise FailedPreconditionError(f"cgroup {cgroup} cannot be frozen: {e.strerror}") from e
    raise FailedPreconditionError(f"cgroup {cgroup} cannot be frozen: a process in it does not stop")


def thaw(cgroup: str) -> None:
    """Let all processes of a cgroup run; one that is not frozen, or gone, is no error. Raises CriError, OSError."""
    freezer = _freezer(cgroup)
    try:
        _write(freezer.switch, freezer.off)
        thawed = _read(freezer.asked).strip() == "0"
    except OSError as e:
        # ENODEV: it was removed since its file was opened.
        if e.errno in (errno.ENOENT, errno.ENODEV):
            return
        raise
    if not thawed:
        raise CriError(f"cgroup {cgroup} is frozen again by somebody as soon as it is thawed")


def _read(path: str) -> str:
    with open(path) as f:
        return f.read()


def _write(path: str, word: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, word.encode())
    finally:
        os.close(fd)
