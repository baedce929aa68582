"""What the kernel tells of a container's processes: open descriptors, sockets, and the limit of the first one.

For metrics only: it takes a system call for each descriptor, so it runs in a thread and within a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from criserver.stats import parse

# A container with more descriptors than this has them counted, but its sockets not told apart.
_MAX_LINKS = 20_000


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Open file descriptors of a container's processes, and how many of them are sockets where that is known.

    ``limit`` is the first process's soft limit of them, None where there is none.
    """

    open: int
    sockets: int | None
    limit: int | None


def survey(containers: Iterable[Sequence[int]], seconds: float) -> list[Descriptors | None]:
    """The descriptors of each container, given the PIDs of each. Blocks for about ``seconds`` at most.

    None for a container without processes, and for those that the time did not suffice for.
    """
    deadline = time.monotonic() + seconds
    return [_count(pids) if pids and time.monotonic() < deadline else None for pids in containers]


def _count(pids: Sequence[int]) -> Descriptors:
    total, sockets = 0, 0
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it has ended
        total += len(names)
        if total <= _MAX_LINKS:
            sockets += sum(_is_socket(f"/proc/{pid}/fd/{name}") for name in names)
    return Descriptors(total, sockets if total <= _MAX_LINKS else None, _limit(pids[0]))


def _is_socket(link: str) -> bool:
    try:
        return os.readlink(link).startswith("socket:")
    except OSError:
        return False


def _limit(pid: int) -> int | None:
    """The soft limit in /proc/PID/limits, which unlike prlimit(2) asks no capability over other users' processes."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as f:
            for line in f:
                if line.startswith(b"Max open files"):
                    return parse.number(line.split()[3])
    except OSError:
        return None
    return None
