"""Ending a process with all that it has started, so that a program that is given up leaves nothing half done behind.

For a shim and the OCI runtime that it runs, and for the daemon where a shim is stuck or one of its programs is late.
"""

from __future__ import annotations

import os
import time

from .lean import SIGKILL, SIGSTOP, signal_pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds. A signal takes a moment to stop a process that is just starting another one.
_PAUSE = 0.002


def end(pid: int, sure: Callable[[], bool] | None = None) -> None:
    """Kill a process, its children, their children and so on; one that is gone is no error.

    All of them are stopped first: a process that dies gives its children away, and nobody could tell any more whose
    they were. `sure` says whether `pid` is still the process that is meant; without it, that is a child of the caller.
    """
    held: dict[int, int] = {}
    try:
        own = os.getpid()
        _hold(held, pid, sure or (lambda: _parent(pid) == own))
        quiet = False
        while held and not quiet:
            time.sleep(_PAUSE)
            quiet = not sum(_hold_children(held, parent) for parent in list(held))
        for pidfd in held.values():
            _signal(pidfd, SIGKILL)
    finally:
        for pidfd in held.values():
            os.close(pidfd)


def _hold_children(held: dict[int, int], parent: int) -> int:
    """Stop the children of a process that are not held yet; how many there were."""
    return sum(
        _hold(held, child, lambda child=child: _parent(child) == parent)  # type: ignore[misc]
        for child in children(parent)
        if child not in held
    )


def _hold(held: dict[int, int], pid: int, sure: Callable[[], bool]) -> bool:
    """Stop a process and keep a descriptor of it; False where it is gone.

    It is opened first and checked afterwards: a descriptor cannot come to mean another process of the same number.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    if not (sure() and _signal(pidfd, SIGSTOP)):
        os.close(pidfd)
        return False
    held[pid] = pidfd
    return True


def _signal(pidfd: int, number: int) -> bool:
    try:
        signal_pidfd(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    """The children of a process (proc(5), /proc/PID/task/TID/children: each thread has its own)."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    except OSError:
        pass  # it has ended
    return found


def argv(pid: int) -> list[str]:
    """The command line of a process; nothing where it is gone (proc(5), /proc/PID/cmdline)."""
    try:
        return [os.fsdecode(word) for word in _read(f"/proc/{pid}/cmdline").split(b"\0")[:-1]]
    except OSError:
        return []


def _parent(pid: int) -> int:
    """The parent of a process, 0 where it is gone (proc(5), /proc/PID/stat field 4)."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def _read(path: str) -> bytes:
    """A whole file of /proc."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while piece := os.read(fd, 65536):
            data += piece
        return data
    finally:
        os.close(fd)
