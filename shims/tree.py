"""Killing a process together with all processes that it has started.

A shim does so with an OCI runtime that takes too long. The daemon does so with a shim that is stuck, and with any
program of its own that takes too long.
"""

from __future__ import annotations

import os
import time

from .lean import SIGKILL, SIGSTOP, signal_pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds. A process that is about to start another one is stopped by a signal only after a moment.
_PAUSE = 0.002
_MAX_ARGV = 64 << 10  # bytes


def end(pid: int, sure: Callable[[], bool] | None = None) -> None:
    """Kill a process, its children, their children and so on. A process that has ended is no error.

    All of them are stopped before any is killed: the children of a dead process get another parent, and then they
    cannot be found. `sure` says whether `pid` is still the process that the caller means. Without `sure`, `pid` must
    be a child of the caller.
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
    """Stop the children of a process that are not held yet. Returns how many there were."""
    return sum(
        _hold(held, child, lambda child=child: _parent(child) == parent)  # type: ignore[misc]
        for child in children(parent)
        if child not in held
    )


def _hold(held: dict[int, int], pid: int, sure: Callable[[], bool]) -> bool:
    """Stop a process and keep a descriptor of it. Returns False if the process has ended.

    The descriptor is opened before the check: from then on the PID cannot pass to another process unseen.
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
    """The command line of a process; empty if it has ended, or is longer than any of ours (/proc/PID/cmdline).

    A process can show gigabytes of its memory as its command line (prctl(2), PR_SET_MM_MAP).
    """
    try:
        fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
        try:
            line = os.read(fd, _MAX_ARGV)
        finally:
            os.close(fd)
    except OSError:
        return []
    return [os.fsdecode(word) for word in line.split(b"\0")[:-1]] if len(line) < _MAX_ARGV else []


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has ended (proc(5), /proc/PID/stat field 4)."""
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
