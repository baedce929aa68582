"""The event loop of a shim and of the nursery: descriptors, child processes and deadlines, in one thread.

The shim's life is a straight script that waits in `Loop.until`; what happens meanwhile is handled by short
callbacks, which never wait themselves, but for the moment that `Loop.adopt` may need.
"""

from __future__ import annotations

import os
import select
import time

from . import tree
from .lean import SIGKILL, SIGSTOP, wake_by_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

_DEFAULT_SIGNALS = [number for number in range(1, 32) if number not in (SIGKILL, SIGSTOP)]
"""What a child gets back to default. Ignored signals pass through exec: without this a container's process
would ignore SIGTERM (as shims do) and SIGPIPE (as Python does) from its start."""

# Seconds.
_ADOPTION_LIMIT = 5.0
_ADOPTION_PAUSE = 0.0005

_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath)}


def wake(_number: int, _frame: FrameType | None) -> None:
    """The handler that SIGCHLD must have before a Loop is made: it makes the wakeup descriptor be written."""


class Call:
    """A program that runs. `late` says that it was killed because it ran for `limit` seconds."""

    __slots__ = ("_argv", "_pid", "late", "limit")

    def __init__(self, pid: int, argv: list[str], limit: float) -> None:
        self._pid = pid
        self._argv = argv
        self.limit = limit
        self.late = False

    def end(self) -> None:
        """Kill it with all that it has started; how it ended is told as ever."""
        if not self._pid:
            return
        # crun forks twice, and what is between ends: the copy of it that becomes the container's process is our child
        # then, and has its arguments until it does. A script may have run it by another name.
        own = self._argv[1:]
        copies = [pid for pid in tree.children(os.getpid()) if pid != self._pid and tree.argv(pid)[1:] == own]
        for pid in (self._pid, *copies):
            tree.end(pid)

    def expire(self) -> None:
        """Its time is up."""
        self.late = True
        self.end()

    def reaped(self) -> None:
        """Its number may be another process's from now on."""
        self._pid = 0


class Loop:
    """epoll, the children of this process and timers. Only one may be in use in a process."""

    __slots__ = ("_calls", "_children", "_epoll", "_pipe", "_timers", "_watched")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        self._children: dict[int, Callable[[int], None]] = {}
        self._calls = 0
        self._timers: dict[object, tuple[float, Callable[[], None]]] = {}
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        wake_by_signals(self._pipe[1])
        self.watch(self._pipe[0], select.EPOLLIN, self._woken)

    def close(self) -> None:
        """Close what the loop has opened: for a fork, which must not wait on its parent's epoll."""
        self._epoll.close()
        for fd in self._pipe:
            os.close(fd)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` whenever `fd` has any of them; EPOLLERR and EPOLLHUP always count."""
        self._epoll.register(fd, events)
        self._watched[fd] = callback

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; to be called before it is closed."""
        del self._watched[fd]
        self._epoll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call `callback` once, after `seconds`, unless the returned handle is cancelled."""
        handle = object()
        self._timers[handle] = (time.monotonic() + seconds, callback)
        return handle

    def cancel(self, handle: object) -> None:
        self._timers.pop(handle, None)

    def spawn(self, argv: list[str], stdio: Sequence[int], limit: float, ended: Callable[[int], None]) -> Call:
        """Run a program whose orphans may become ours; `ended` gets its exit code, or minus its signal.

        `stdio` are the descriptors of its standard input, output and error. After `limit` seconds it is
        killed with all that it has started. Raises OSError if it cannot be started.
        """
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        pid = os.posix_spawn(
            argv[0],
            argv,
            _ENVIRONMENT,
            file_actions=actions,
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        self._calls += 1
        call = Call(pid, argv, limit)
        timer = self.later(limit, call.expire)

        def finished(code: int) -> None:
            call.reaped()
            self.cancel(timer)
            try:
                ended(code)
            finally:
                self._calls -= 1

        self._children[pid] = finished
        return call

    def adopt(self, pid: int, ended: Callable[[int], None]) -> None:
        """Wait for a process that a spawned program left to us; `ended` as in `spawn`.

        To be called from the program's `ended`: until then an orphan is not reaped, so its status is not
        lost and its number is not used again. Raises ChildProcessError if `pid` does not become our child.
        """
        deadline = time.monotonic() + _ADOPTION_LIMIT
        while pid not in self._children:
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                self._children[pid] = ended
            except ChildProcessError:
                # crun ends a moment before the fork of itself that is the process's parent.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_ADOPTION_PAUSE)

    def until(self, done: Callable[[], bool], limit: float | None = None) -> bool:
        """Handle events until `done()`, or for `limit` seconds; returns `done()`."""
        deadline = None if limit is None else time.monotonic() + limit
        while not done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            moments = [when for when, _ in self._timers.values()]
            if deadline is not None:
                moments.append(deadline)
            for fd, events in self._epoll.poll(max(0, min(moments) - now) if moments else None):
                callback = self._watched.get(fd)  # an earlier callback of this round may have closed it
                if callback is not None:
                    callback(events)
            self._expire()
        return True

    def rest(self, seconds: float) -> None:
        """Handle events for `seconds`."""
        self.until(lambda: False, seconds)

    def _expire(self) -> None:
        if self._timers:
            now = time.monotonic()
            for handle, (when, callback) in list(self._timers.items()):
                if when <= now and self._timers.pop(handle, None) is not None:
                    callback()

    def _woken(self, _events: int) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        """Collect the children that have ended: known ones first, for a program's `ended` may adopt others.

        Unknown ones (orphans of the container or of hooks) only while no program runs that may name them.
        """
        found = True
        while found:
            found = False
            for pid in list(self._children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found = True
                    self._children.pop(pid)(os.waitstatus_to_exitcode(status))
        while not self._calls:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not ended:
                return
            callback = self._children.pop(ended, None)
            if callback is not None:
                callback(os.waitstatus_to_exitcode(status))
