"""The nursery: one small process, started once, that forks a shim for each container.

It imports all that a shim needs and freezes its heap first, so that a shim is a fork (under a millisecond)
that shares nearly all of its memory. It ends when the daemon does; shims stay.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket

from .shim import Config, RequestError, Shim
from .wire import VERSION, Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .wire import Message

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl


def main(fd: int) -> None:
    """Serve the daemon on the connected unix stream socket `fd` until it closes.

    Greets with {"hello": "nursery", ...}. {"op": "fork", "config": {...}} with one descriptor, the shim's
    first connection, is answered with {"ok": true, "pid": N} or {"error": text}.
    """
    _prctl(_PR_SET_NAME, b"criserver-nurse", 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the shims
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o022)
    os.chdir("/")
    devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    channel = Channel(socket.socket(fileno=fd))
    gc.collect()
    _libc.malloc_trim(0)
    gc.freeze()
    try:
        channel.send({"hello": "nursery", "version": VERSION, "pid": os.getpid()})
        while True:
            for message, fds in channel.receive():
                answer = _answer(channel, devnull, message, fds)
                channel.send({"re": message.get("re"), **answer})
    except (EOFError, OSError, ProtocolError):
        return  # the daemon has gone, or is no daemon


def _answer(channel: Channel, devnull: int, message: Message, fds: list[int]) -> Message:
    try:
        config = _fork_request(message, fds)
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become_shim(config, devnull, fds[0])
    except (OSError, RequestError) as error:
        return {"error": str(error)}
    finally:
        for fd in fds:
            os.close(fd)
    return {"ok": True, "pid": pid}


def _fork_request(message: Message, fds: list[int]) -> Config:
    if message.get("op") != "fork":
        raise RequestError(f"unknown operation {message.get('op')!r}: this nursery has version {VERSION}")
    settings = message.get("config")
    if not isinstance(settings, dict) or len(fds) != 1:
        raise RequestError("fork takes a configuration and one file descriptor")
    return Config(settings)


def _become_shim(config: Config, devnull: int, fd: int) -> None:
    """Live a shim's life in a fork of the nursery; does not return.

    Only SIGKILL ends it early: service managers send the others to everything that the daemon has started.
    """
    code = 1
    try:
        os.setsid()
        _prctl(_PR_SET_NAME, b"criserver-shim", 0, 0, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (0, 1, 2):
            os.dup2(devnull, number)
        os.close(devnull)
        os.chdir(config.directory)
        Shim(config, socket.socket(fileno=fd)).run()
        code = 0
    except BaseException:  # noqa: BLE001 - there is nowhere else to go from here
        _report_crash(config)
    finally:
        os._exit(code)


def _report_crash(config: Config) -> None:
    """Leave the traceback in the state directory."""
    import traceback

    with open(f"{config.directory}/shim.crash", "a") as file:
        traceback.print_exc(file=file)
