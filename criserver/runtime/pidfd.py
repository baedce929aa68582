"""Processes of this node: which process a PID means, signals to it, its end.

The kernel may give the PID of an ended process to another one. So a process is identified by its PID and its start
time, in clock ticks since boot. It is opened first (pidfd_open(2)), and its start time is compared afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import Callable

from shims import tree

# Errors of pidfd_open(2) if no process has the PID, or only a thread has it.
_NO_PROCESS = frozenset({errno.ESRCH, errno.EINVAL, errno.ENOENT})
# Seconds between two checks whether killed processes have ended.
_END_INTERVAL = 0.01


def start_ticks(pid: int) -> int:
    """The start time of a process, in clock ticks since boot: field 22 of /proc/PID/stat. 0 if it is gone.

    Raises OSError if the kernel cannot tell, for example if no file descriptor is free.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def open_process(pid: int, started: int) -> int | None:
    """A descriptor of the process with this PID and start time; None if it is gone. The caller closes it.

    Raises OSError if the kernel cannot tell, for example if no file descriptor is free.
    """
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as e:
        if e.errno in _NO_PROCESS:
            return None
        raise
    # The start time is read after opening: an open descriptor never refers to another process.
    try:
        same = start_ticks(pid) == started
    except BaseException:
        os.close(pidfd)
        raise
    if same:
        return pidfd
    os.close(pidfd)
    return None


def send_signal(pid: int, started: int, number: int) -> None:
    """Send a signal to the process with this PID and start time; it may have ended already.

    Raises OSError as :func:`open_process` does.
    """
    pidfd = open_process(pid, started)
    if pidfd is None:
        return
    try:
        sys.audit("criserver.pidfd_send_signal", pid, number)
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def watch(pid: int, started: int, on_end: Callable[[], None]) -> bool:
    """Call ``on_end`` in the event loop when the process with this PID and start time ends.

    Returns False, and does nothing, if the process is gone already.
    Raises OSError as :func:`open_process` does.
    """
    pidfd = open_process(pid, started)
    if pidfd is None:
        return False
    loop = asyncio.get_running_loop()

    def readable() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        on_end()

    loop.add_reader(pidfd, readable)
    return True


def processes_in(directory: str) -> list[int]:
    """The processes with this working directory: a container's shim, and the OCI runtime while it runs."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and is_in(int(name), directory)]


def is_in(pid: int, directory: str) -> bool:
    """Whether a process has this working directory; False if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == directory
    except OSError:
        return False


def zombie_code(pid: int) -> int | None:
    """The exit code of a process that has ended but was not reaped; None for any other process.

    A process that a signal has ended has the code 128 + the signal's number. The state, the number of threads and the
    exit status are fields 3, 20 and 52 of /proc/PID/stat (proc(5)). The state is that of the first thread. The process
    has ended when no other thread is left.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] != b"Z" or int(fields[17]) > 1:
        return None
    code = os.waitstatus_to_exitcode(int(fields[49]))
    return code if code >= 0 else 128 - code


def end_all_in(directory: str, limit: float) -> list[int]:
    """Kill the processes with this working directory, and all processes that they have started. Blocks.

    Returns those with this working directory that have not ended after ``limit`` seconds.
    """
    deadline = time.monotonic() + limit
    while pids := processes_in(directory):
        if time.monotonic() > deadline:
            return pids
        for pid in pids:
            tree.end(pid, lambda pid=pid: is_in(pid, directory))  # type: ignore[misc]
        time.sleep(_END_INTERVAL)
    return []
