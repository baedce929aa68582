"""What processes use, read from /proc."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterable, Iterator

_SAMPLED_EVERY = 0.03
_TICKS = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h


def matching(words: bytes) -> list[int]:
    """The PIDs of all processes whose command line has ``words``. In the benchmark's namespace all are its own."""
    return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if words in command_line(pid)]


def descendants(ancestor: int) -> list[int]:
    """The PIDs of all processes that descend from one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
                parent = int(f.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, pending = [], [ancestor]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def command_line(pid: int) -> bytes:
    """A process's arguments, each ended by NUL; empty for one that is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read()
    except OSError:
        return b""


def memory(pid: int) -> float:
    """A process's PSS in MiB."""
    return _mapped(pid, "Pss:")


def anonymous_memory(pid: int) -> float:
    """A process's memory in MiB that is of no file."""
    return _mapped(pid, "Anonymous:")


def _mapped(pid: int, name: str) -> float:
    """A sum over a process's mappings (/proc/PID/smaps_rollup, proc(5)) in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        for line in f:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    raise KeyError(pid)


def on_cpu(pids: Iterable[int]) -> float:
    """CPU seconds of these processes, with their threads that have ended, exact to the nanosecond.

    Each process has a clock of its own, whose number is made of its PID (clock_getcpuclockid(3)).
    """
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    return total


def with_ended_children(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended (proc(5), stat fields 14 to 17)."""
    with open(f"/proc/{pid}/stat") as f:
        return sum(map(int, f.read().rpartition(")")[2].split()[11:15])) / _TICKS


@contextlib.contextmanager
def peak_memory(daemon: int, before: float) -> Iterator[list[float]]:
    """One figure: the highest PSS in MiB of a daemon and its new descendants during the block, less ``before``."""
    old = set(descendants(daemon))
    found = [0.0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLED_EVERY):
            total = memory(daemon) - before
            for pid in descendants(daemon):
                with contextlib.suppress(OSError, KeyError):
                    total += 0 if pid in old else memory(pid)
            found[0] = max(found[0], total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def await_end(pidfd: int) -> None:
    """Wait until the process of a pidfd has ended, and close it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    os.close(pidfd)
