"""The open descriptors and sockets of a container's processes, and the limit of its first process.

For metrics alone. It needs a system call for each descriptor, so it runs in a thread and has a deadline.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from criserver.stats import kernel_text

# Sockets are counted among so many descriptors at most. For a container with more, their number is not known.
_MAX_LINKS = 20_000


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The open file descriptors of a container's processes, and the number of sockets, None where it is not known.

    ``limit`` is the soft limit of the first process, None where it has none.
    """

    open: int
    sockets: int | None
    limit: int | None


def count_descriptors(containers: Iterable[Sequence[int]], seconds: float) -> list[Descriptors | None]:
    """Count the descriptors of containers by their PIDs. Blocks for about ``seconds`` at most.

    None for a container without processes, and for containers after the deadline.
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
    """The soft limit in /proc/PID/limits. Unlike prlimit(2), it needs no capability for other users' processes."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as f:
            for line in f:
                if line.startswith(b"Max open files"):
                    return kernel_text.number(line.split()[3])
    except OSError:
        return None
    return None
