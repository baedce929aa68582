"""The daemon's end of a connection to a shim or to the nursery: awaitable requests, and events.

:mod:`shims.wire` has the protocol, :mod:`shims.messages` the messages.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from shims import wire

if TYPE_CHECKING:
    from shims.messages import Request, ShimMessage

log = structlog.get_logger(__name__)

# Seconds. A shim answers in less than a millisecond; one that takes longer than this is stuck.
REPLY_TIMEOUT = 10.0
_CONNECT_INTERVAL = 0.02


class ShimLink:
    """A connection to a shim or to the nursery.

    ``on_event`` gets every message that is not a reply. ``on_close`` is called once, when the other side has closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_event: Callable[[ShimMessage], None],
        on_close: Callable[[], None],
        peer: str = "the shim",
    ) -> None:
        sock.setblocking(False)
        self._peer = peer
        self._sock = sock
        self._on_event = on_event
        self._on_close = on_close
        self._frames = wire.Frames()
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[tuple[wire.Message, list[int]]]] = {}
        self._out: list[tuple[bytes, list[int]]] = []
        self._fds: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)
        self.closed = False

    async def request(self, message: Request, fds: Sequence[int] = (), timeout: float | None = None) -> list[int]:
        """Send ``message``, wait for the reply, and return the descriptors that came with it: the caller closes them.

        ``fds`` go with the message and stay the caller's. ``timeout`` is REPLY_TIMEOUT by default. Raises
        UnavailableError where the other side is gone, DeadlineExceededError where it is stuck, and CriError with its
        text where it refuses.
        """
        if self.closed:
            raise UnavailableError(f"{self._peer} has ended")
        timeout = REPLY_TIMEOUT if timeout is None else timeout
        number = next(self._numbers)
        reply: asyncio.Future[tuple[wire.Message, list[int]]] = self._loop.create_future()
        self._replies[number] = reply
        # Duplicates: the caller may close its own before these are sent.
        frame = wire.encode({**message, "re": number, "fds": len(fds)})
        self._out.append((frame, [os.dup(fd) for fd in fds]))
        self._flush()
        try:
            await asyncio.wait([reply], timeout=timeout)
            # A busy daemon may see the reply and the end of the time at once. Then the reply counts.
            if not reply.done():
                raise DeadlineExceededError(f"{self._peer} did not answer {message['op']!r} within {timeout:g} s")
            answer, received = reply.result()
        except asyncio.CancelledError:
            if reply.done() and reply.exception() is None:
                _close_all(reply.result()[1])
            raise
        finally:
            self._replies.pop(number, None)
        if "error" in answer:
            raise CriError(str(answer["error"])) from kernel_error(answer)
        return received

    def close(self) -> None:
        """Close the connection. The other side goes on."""
        if not self.closed:
            self.abandon()
            self._on_close()

    def abandon(self) -> None:
        """Close the connection without a call of ``on_close``: the daemon ends, and the shim goes on."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        _close_all(self._fds)
        self._fds.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(UnavailableError(f"{self._peer} has ended"))

    def _flush(self) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sys.audit("criserver.send", self._peer)
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self.close()
                return
            _close_all(fds)
            if sent == len(data):
                self._out.pop(0)
            else:
                self._out[0] = (data[sent:], [])
        self._loop.remove_writer(self._sock)

    def _take(self, message: wire.Message) -> None:
        """Hand on one event. An exception is logged and goes no further: the next event may be an exit."""
        try:
            self._on_event(present_shape(message))
        except Exception as e:
            log.exception(
                "an event of a shim could not be handled",
                peer=self._peer,
                event_name=message.get("event"),
                error=str(e),
            )

    def _readable(self) -> None:
        try:
            data, fds = wire.receive_once(self._sock)
            self._fds += fds
            messages = self._frames.feed(data) if data else None
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError) as e:
            log.warning("a connection is broken", peer=self._peer, error=str(e))
            messages = None
        if messages is None:
            self.close()
            return
        for message in messages:
            count = message.get("fds", 0)
            fds, self._fds = self._fds[:count], self._fds[count:]
            number = message.get("re")
            if number is None:
                self._take(message)
            elif (reply := self._replies.get(number)) is not None and not reply.done():
                reply.set_result((message, fds))
                continue
            _close_all(fds)


def connect(path: str, on_event: Callable[[ShimMessage], None], on_close: Callable[[], None]) -> ShimLink:
    """Connect to the shim that listens at ``path``, in the directory of its container.

    Raises OSError if no shim listens; BlockingIOError if its queue of connections is full.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        # 1. By the directory's descriptor: a socket address has 107 bytes, and the path may be longer.
        # 2. Non-blocking: a stopped shim accepts no connection, and then its queue may be full.
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return ShimLink(sock, on_event, on_close, peer_name(os.path.basename(os.path.dirname(path))))


async def connect_in_turn(path: str, on_event: Callable[[ShimMessage], None], on_close: Callable[[], None]) -> ShimLink:
    """As :func:`connect`; where many connect at once it waits until the shim's queue has room.

    Raises DeadlineExceededError where the shim is stuck, FailedPreconditionError where it is gone.
    """
    peer = peer_name(os.path.basename(os.path.dirname(path)))
    try:
        async with asyncio.timeout(REPLY_TIMEOUT):
            while True:
                try:
                    return connect(path, on_event, on_close)
                except BlockingIOError:
                    await asyncio.sleep(_CONNECT_INTERVAL)
    except TimeoutError:
        raise DeadlineExceededError(f"{peer} accepted no connection within {REPLY_TIMEOUT:g} s") from None
    except OSError as e:
        raise FailedPreconditionError(f"{peer} cannot be reached: {e.strerror}") from e


def present_shape(message: dict[str, Any]) -> ShimMessage:
    """Bring what a shim told to the shape of :mod:`shims.messages`. Shims of 0.1.0 differ in these:

    1. Their greeting has the PID of the shim itself as "pid", and "init" without a value while the container starts.
    2. Their "started" event has the container's first process as "pid".
    3. Their exec events name the exec "exec".
    4. Their events of failures have no "late".

    Present shims send the old keys of 2 and 3 as well, for daemons of 0.1.0.
    """
    event = message.get("event")
    if "hello" in message:
        message.pop("pid", None)
        if message.get("init", 0) is None:
            del message["init"]
    elif event == "started" and "pid" in message:
        message["init"] = message.pop("pid")
    elif event in ("exec-failed", "exec-exited") and "exec" in message:
        message["exec_id"] = message.pop("exec")
    if event in ("failed", "exec-failed"):
        message.setdefault("late", False)
    return message  # type: ignore[return-value]  # of any version: its receiver ignores what it does not know


def kernel_error(message: Mapping[str, Any]) -> OSError | None:
    """The error of the kernel that a failure was caused by, as the shim or the nursery tells it."""
    return OSError(message["errno"], str(message["error"])) if message.get("errno") else None


def peer_name(container: str) -> str:
    """How errors name the shim of a container."""
    return f"the shim of container {container}"


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
