"""The nursery: one small process, started once, that forks a shim for each container.

It first imports all that a shim needs and freezes its heap. So a shim is a fork, made in less than a millisecond, which
shares nearly all of its memory with the nursery. The nursery ends with the daemon; shims go on.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select

from .lean import ENDING_SIGNALS, SIGCHLD, Socket, ignore_signal, on_signal
from .loop import Loop, wake
from .shim import Shim
from .shim_config import RequestError, ShimConfig, reason
from .wire import VERSION, Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .messages import NurseryGreeting, Reply
    from .wire import Message

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl


def main(fd: int) -> None:
    """Serve the daemon on the connected unix stream socket `fd` until it closes.

    `shims.messages` has what both sides send: a greeting, then a reply to each request for a fork.
    """
    _prctl(_PR_SET_NAME, b"criserver-nurse", 0, 0, 0)
    # The processes of a shim that is killed become children of the nursery, which reaps them. PID 1 of a node may take
    # seconds for that, and the kernel keeps a PID namespace until all processes in it are reaped.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    on_signal(SIGCHLD, wake)
    for number in ENDING_SIGNALS:
        ignore_signal(number)
    os.umask(0o022)
    os.chdir("/")
    nursery = _NurseryProcess(Channel(Socket(fileno=fd)))
    gc.collect()
    _libc.malloc_trim(0)
    gc.freeze()
    nursery.run()


class _NurseryProcess:
    """The nursery's own state; a shim closes it after the fork."""

    __slots__ = ("_channel", "_devnull", "_gone", "_loop")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._gone = False
        self._loop = Loop()

    def run(self) -> None:
        """Serve until the daemon has ended. The loop reaps shims that end meanwhile."""
        self._loop.watch(self._channel.fileno(), select.EPOLLIN, self._serve)
        greeting: NurseryGreeting = {"hello": "nursery", "version": VERSION}
        self._channel.send(greeting)
        self._loop.until(lambda: self._gone)

    def _serve(self, _events: int) -> None:
        try:
            for message, fds in self._channel.receive():
                answer = self._answer(message, fds)
                self._channel.send({"re": message.get("re"), **answer})
        except (EOFError, OSError, ProtocolError):
            self._gone = True

    def _answer(self, message: Message, fds: list[int]) -> Reply:
        try:
            config = _fork_request(message, fds)
            kind = _shim_of(config)
            if os.fork() == 0:
                self._become_shim(kind, config, fds[0])
        except RequestError as error:
            return {"error": reason(error)}
        except OSError as error:
            return {"error": reason(error), "errno": error.errno or 0}
        finally:
            for fd in fds:
                os.close(fd)
        return {"ok": True}

    def _become_shim(self, kind: type[Shim], config: ShimConfig, fd: int) -> None:
        """Be a shim, in a fork of the nursery. Does not return.

        Only SIGKILL ends a shim early. It ignores the other ending signals, since a service manager sends them to
        all processes that the daemon has started.
        """
        code = 1
        try:
            self._channel.close()
            self._loop.close()
            os.setsid()
            _prctl(_PR_SET_NAME, b"criserver-shim", 0, 0, 0)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            for number in (0, 1, 2):
                os.dup2(self._devnull, number)
            os.close(self._devnull)
            os.chdir(config.directory)
            kind(config, Socket(fileno=fd)).run()
            code = 0
        except BaseException:  # noqa: BLE001 - nobody could catch it after this
            _report_crash(config)
        finally:
            os._exit(code)


def _shim_of(config: ShimConfig) -> type[Shim]:
    """The class of the shim. That for a runtime's own shim is imported when the first container needs it."""
    if config.task is None:
        return Shim
    from .task_shim import TaskShim

    return TaskShim


def _fork_request(message: Message, fds: list[int]) -> ShimConfig:
    if message.get("op") != "fork":
        raise RequestError(f"unknown operation {message.get('op')!r}: this nursery has version {VERSION}")
    settings = message.get("config")
    if not isinstance(settings, dict) or len(fds) != 1:
        raise RequestError("fork takes a configuration and one file descriptor")
    return ShimConfig(settings)


def _report_crash(config: ShimConfig) -> None:
    """Leave the traceback in the state directory."""
    import traceback

    with open(f"{config.directory}/shim.crash", "a") as file:
        traceback.print_exc(file=file)
