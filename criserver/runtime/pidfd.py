"""Processes of this node as the kernel shows them: which one a PID means, its signals, its end.

A PID alone may mean another process by now. A process is therefore named by its PID and its start in clock ticks since
boot, and opened before the start is compared (pidfd_open(2)).
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Callable

from shims import tree

# Of pidfd_open(2): nothing has the number, or only a thread has it.
_NO_PROCESS = frozenset({errno.ESRCH, errno.EINVAL, errno.ENOENT})
_END_INTERVAL = 0.01


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: field 22 of /proc/PID/stat. 0 where it is gone.

    Raises OSError where the kernel cannot say, as for want of a descriptor.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def open_process(pid: int, started: int) -> int | None:
    """A descriptor of the very process that started at these ticks, None where it is gone. The caller closes it.

    Raises OSError where the kernel cannot say, as for want of a descriptor.
    """
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as e:
        if e.errno in _NO_PROCESS:
            return None
        raise
    # The start is looked up after opening: from here on the descriptor cannot come to mean another process.
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
    """Send a signal to the very process that started at these ticks; one that has ended is no error.

    Raises OSError as :func:`open_process` does.
    """
    pidfd = open_process(pid, started)
    if pidfd is None:
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def watch(pid: int, started: int, on_end: Callable[[], None]) -> bool:
    """Call ``on_end`` in the event loop when the very process that started at these ticks ends; False if it has ended.

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
    """The processes whose working directory this is: a container's shim, and the OCI runtime while it runs."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and is_in(int(name), directory)]


def is_in(pid: int, directory: str) -> bool:
    """Whether this is a process's working directory; one that has ended has none."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == directory
    except OSError:
        return False


def zombie_code(pid: int) -> int | None:
    """The exit code of a process that has ended and was not reaped (128 + a signal's number); None for any other.

    proc(5), /proc/PID/stat: fields 3 and 52.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] != b"Z":
        return None
    code = os.waitstatus_to_exitcode(int(fields[49]))
    return code if code >= 0 else 128 - code


def end_all_in(directory: str, limit: float) -> list[int]:
    """Kill the processes with this working directory and all that they have started. Blocks.

    Returns those that have not ended after ``limit`` seconds.
    """
    deadline = time.monotonic() + limit
    while pids := processes_in(directory):
        if time.monotonic() > deadline:
            return pids
        for pid in pids:
            tree.end(pid, lambda pid=pid: is_in(pid, directory))  # type: ignore[misc]
        time.sleep(_END_INTERVAL)
    return []
