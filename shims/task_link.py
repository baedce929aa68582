"""The connection to a shim of containerd's kind, by which a shim of ours asks it to run and to end a container."""

from __future__ import annotations

import os
import select

from .lean import AF_UNIX, SOCK_STREAM, Socket, accept
from .runtime import LateError
from .shim_config import RequestError
from .task_wire import MAX_MESSAGE, REQUEST, RESPONSE, TaskFrames, content, data, fields, frame, integer, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

    Done = Callable[[bytes, RequestError | None], None]
    """Gets the reply of a call, or why there is none."""

_READ_SIZE = 1 << 16
_NAMESPACE_KEY = "containerd-namespace-ttrpc"


class TaskLink:
    """A ttrpc client of the service `service`. `closed` turns true when the other side has gone, or is stuck."""

    __slots__ = ("_calls", "_frames", "_loop", "_namespace", "_out", "_service", "_sock", "_stream", "closed")

    def __init__(self, loop: Loop, address: str, service: str, namespace: str) -> None:
        """Connect. `address` is unix://PATH. Raises OSError."""
        self._sock = Socket(AF_UNIX, SOCK_STREAM)
        try:
            self._sock.connect(address.removeprefix("unix://"))
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self._loop = loop
        self._service = service
        self._namespace = data(5, data(1, _NAMESPACE_KEY) + data(2, namespace))
        self._frames = TaskFrames()
        self._calls: dict[int, tuple[Done, object]] = {}
        self._out = bytearray()
        self._stream = -1
        self.closed = False
        loop.watch(self._sock.fileno(), select.EPOLLIN, self._event)

    def call(
        self, method: str, message: bytes, done: Done, limit: float = 0, *, asked: float = 0, vital: bool = False
    ) -> None:
        """Send a request. One that is not answered within `limit` seconds fails, and a later answer is ignored.

        The runtime's shim is told the limit, or the `asked` seconds, after which it is to give up. A shim that does not
        answer a `vital` request is stuck: the connection closes, and all calls fail.
        """
        if self.closed:
            done(b"", RequestError("the runtime's shim has ended"))
            return
        timeout = number(4, int((limit or asked) * 1e9))
        request = data(1, self._service) + data(2, method) + data(3, message) + timeout + self._namespace
        if len(request) > MAX_MESSAGE:
            done(b"", RequestError(f"a request of {len(request)} bytes is larger than ttrpc's {MAX_MESSAGE}"))
            return
        self._stream += 2  # clients have odd numbers
        stream = self._stream
        timer = self._loop.later(limit, lambda: self._late(stream, method, limit, vital)) if limit else None
        self._calls[stream] = (done, timer)
        self._out += frame(stream, REQUEST, request)
        self._flush()

    def ask(self, method: str, message: bytes, limit: float) -> bytes:
        """Send a request and wait for the reply. Raises RequestError, LateError where there is none in time."""
        outcome: list[tuple[bytes, RequestError | None]] = []
        self.call(method, message, lambda reply, error: outcome.append((reply, error)), limit, vital=True)
        self._loop.until(lambda: bool(outcome))
        reply, error = outcome[0]
        if error is not None:
            raise error
        return reply

    def close(self, error: RequestError | None = None) -> None:
        """Close the connection. All calls fail."""
        if self.closed:
            return
        self.closed = True
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        for stream in list(self._calls):
            self._answer(stream, b"", error or RequestError("the runtime's shim has ended"))

    def _late(self, stream: int, method: str, limit: float, vital: bool) -> None:
        late = LateError(f"the runtime's shim did not answer {method} within {limit:g} s")
        self._answer(stream, b"", late)
        if vital:
            self.close(late)

    def _answer(self, stream: int, reply: bytes, error: RequestError | None) -> None:
        done, timer = self._calls.pop(stream, (None, None))
        if done is not None:
            self._loop.cancel(timer)
            done(reply, error)

    def _event(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if self.closed or not events & ~select.EPOLLOUT:
            return
        try:
            block = self._sock.recv(_READ_SIZE)
            frames = self._frames.feed(block)
        except BlockingIOError:
            return
        except (OSError, RequestError):
            block = b""
        if not block:
            self.close()
            return
        for stream, kind, message in frames:
            if kind == RESPONSE:
                self._response(stream, message)

    def _response(self, stream: int, message: bytes) -> None:
        error: RequestError | None = None
        try:
            response = fields(message)
            status = fields(content(response, 1))
        except RequestError as wrong:
            self._answer(stream, b"", wrong)
            return
        if integer(status, 1):
            words = content(status, 2).decode(errors="replace").strip()
            error = RequestError(words or f"the runtime's shim failed with code {integer(status, 1)}")
        self._answer(stream, content(response, 2), error)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._sock.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._loop.change(self._sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._out else 0))


class EventSink:
    """Takes what a shim tells containerd, and answers that it has arrived. Nobody here needs it."""

    __slots__ = ("_loop",)

    def __init__(self, loop: Loop, listener: Socket) -> None:
        self._loop = loop
        loop.watch(listener.fileno(), select.EPOLLIN, lambda _: self._accept(listener))

    def _accept(self, listener: Socket) -> None:
        try:
            sock = accept(listener)
        except OSError:
            return
        sock.setblocking(False)
        frames = TaskFrames()
        self._loop.watch(sock.fileno(), select.EPOLLIN, lambda _: self._serve(sock, frames))

    def _serve(self, sock: Socket, frames: TaskFrames) -> None:
        try:
            block = sock.recv(_READ_SIZE)
            for stream, kind, _ in frames.feed(block):
                if kind == REQUEST:
                    sock.send(frame(stream, RESPONSE, b""))
        except BlockingIOError:
            return
        except (OSError, RequestError):
            block = b""
        if not block:
            self._loop.forget(sock.fileno())
            sock.close()


def discard(loop: Loop, name: str) -> None:
    """Make a FIFO in the current directory, and read and forget what comes. A shim writes its log there, and waits."""
    os.mkfifo(name, 0o600)
    fd = os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def take(_events: int) -> None:
        try:
            os.read(fd, _READ_SIZE)
        except BlockingIOError:
            pass

    loop.watch(fd, select.EPOLLIN, take)
