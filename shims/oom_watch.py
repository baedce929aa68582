"""Whether the kernel killed a process of the container because its memory limit was reached."""

from __future__ import annotations

import os
import select

from .runtime import read_small

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop


class OomWatch:
    """The OOM kills of the container, by its own cgroup's count or by the pod's.

    systemd removes a scope, with its count, as soon as the last process of it has ended. The pod's count stays: it is
    the sum of the container's kills and of the other containers' kills. So the others' kills are followed here.
    """

    __slots__ = ("_files", "_loop", "_others", "_pod")

    def __init__(self, loop: Loop, files: list[str], pod: str) -> None:
        """`files` have the container's own count, `pod` is the `memory.events` of the pod's cgroup (v2) or empty."""
        self._loop = loop
        self._files = files
        self._pod = pod
        self._others = max(0, _kills(pod)) if pod else 0

    def start(self) -> None:
        """Follow the pod's count. A poll of the file returns when the count changes (kernel, cgroup-v2.rst)."""
        if not self._pod:
            return
        try:
            fd = os.open(self._pod, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self._loop.watch(fd, select.EPOLLPRI, lambda _: self._count_others(fd))
        self._count_others(fd)

    def killed(self, failed: bool) -> bool:
        """Whether there was a kill. Without a count of its own, only a container that has `failed` can have had one."""
        own = self._own()
        if own < 0 and self._pod and failed:
            own = _kills(self._pod) - self._others
        return own > 0

    def _count_others(self, fd: int) -> None:
        try:
            os.pread(fd, 4096, 0)  # without a read, the next poll would return at once
        except OSError:
            self._loop.forget(fd)
            os.close(fd)
            return
        # The sum is read first: a kill between the two readings counts as the container's own.
        total, own = _kills(self._pod), self._own()
        if total >= 0 and own >= 0:
            self._others = total - own

    def _own(self) -> int:
        return max((_kills(path) for path in self._files), default=-1)


def _kills(path: str) -> int:
    """The kernel's count in a `memory.events` (cgroup v2) or `memory.oom_control` (v1) file; -1 if unread."""
    try:
        for line in read_small(path).splitlines():
            if line.startswith(b"oom_kill "):
                return int(line[9:])
    except (OSError, ValueError):
        pass
    return -1
