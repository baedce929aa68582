"""The event loop of a shim and of the nursery: descriptors, child processes and deadlines, in one thread.

The code of a shim's life runs straight on and waits in `Loop.until`. Meanwhile callbacks handle what happens. They are
short and do not wait; only `Loop.adopt` may wait for a moment.
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
"""The signals that a child does not ignore. A process keeps ignoring a signal through execve(2): without this list, a
container's process would ignore SIGTERM, as shims do, and SIGPIPE, as Python does."""

# Seconds.
_ADOPTION_LIMIT = 5.0
_ADOPTION_PAUSE = 0.0005

_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath)}


def wake(_number: int, _frame: FrameType | None) -> None:
    """The handler of SIGCHLD, to be set before a Loop is made. With a handler, Python writes to the wake-up pipe."""


class ChildProgram:
    """A program that runs. `late` says that it was killed because it ran for `limit` seconds."""

    __slots__ = ("_argv", "_pid", "late", "limit")

    def __init__(self, pid: int, argv: list[str], limit: float) -> None:
        self._pid = pid
        self._argv = argv
        self.limit = limit
        self.late = False

    def end(self) -> None:
        """Kill it with all that it has started. `ended` is called as it is at any other end."""
        if not self._pid:
            return
        # crun forks twice, and the process in the middle ends. So the copy of crun that becomes the container's process
        # is a child of the shim; it has crun's arguments until then. A script may have run crun by another name.
        own = self._argv[1:]
        copies = [pid for pid in tree.children(os.getpid()) if pid != self._pid and tree.argv(pid)[1:] == own]
        for pid in (self._pid, *copies):
            tree.end(pid)

    def expire(self) -> None:
        """Its time limit is reached."""
        self.late = True
        self.end()

    def reaped(self) -> None:
        """It has ended: its PID may be another process's from now on."""
        self._pid = 0


class Loop:
    """epoll, child processes and timers. A process can use only one Loop."""

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
        """Close the loop's own descriptors. A forked child does so, since it must not wait on its parent's epoll."""
        self._epoll.close()
        for fd in self._pipe:
            os.close(fd)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` when `fd` has one of the events. EPOLLERR and EPOLLHUP are always included."""
        self._epoll.register(fd, events)
        self._watched[fd] = callback

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`. The caller closes it after this, not before."""
        del self._watched[fd]
        self._epoll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call `callback` once, after `seconds`, unless the returned handle is cancelled."""
        handle = object()
        self._timers[handle] = (time.monotonic() + seconds, callback)
        return handle

    def cancel(self, handle: object) -> None:
        self._timers.pop(handle, None)

    def spawn(
        self,
        argv: list[str],
        stdio: Sequence[int],
        limit: float,
        ended: Callable[[int], None],
        environment: dict[str, str] | None = None,
    ) -> ChildProgram:
        """Run a program; `environment` are variables beside PATH. What it leaves behind may become children here.

        `ended` gets its exit code, or minus the signal that ended it. `stdio` are the descriptors of its standard
        input, output and error. After `limit` seconds it is killed with all that it has started. Raises OSError if
        it cannot be started.
        """
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        pid = os.posix_spawn(
            argv[0],
            argv,
            {**_ENVIRONMENT, **(environment or {})},
            file_actions=actions,
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        self._calls += 1
        call = ChildProgram(pid, argv, limit)
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
        """Wait for the end of a process that a spawned program has left behind. `ended` is as in `spawn`.

        The caller does this in the program's `ended`. Until that returns, no unknown child is reaped: the status of
        `pid` is not lost, and its number is not used again. Raises ChildProcessError if `pid` does not become a child
        of this process.
        """
        deadline = time.monotonic() + _ADOPTION_LIMIT
        while pid not in self._children:
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                self._children[pid] = ended
            except ChildProcessError:
                # The process's parent is a fork of crun, which ends a moment after crun.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_ADOPTION_PAUSE)

    def until(self, done: Callable[[], bool], limit: float | None = None) -> bool:
        """Handle events until `done()` is true, or for `limit` seconds. Returns `done()`."""
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
        """Reap the children that have ended.

        1. Known children come first, since a program's `ended` may adopt another child.
        2. Unknown children (orphans of the container or of its hooks) are reaped only while no program runs, since a
           program may name one of them for adoption when it ends.
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
