"""One client's connection: bytes in and out at the client's pace, and a clean end."""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress

# Bytes that are read at once, and so the longest turn that a client can take of the loop: nothing but tiny frames costs
# a millisecond for each KiB.
READ_SIZE = 64 << 10
# Bytes that wait for a client to take them before a writer has to wait, beside what the kernel holds.
WRITE_LIMIT = 256 << 10
# Bytes beyond which nothing more is read from a client: so much is owed to one that demands answers and takes none.
ANSWER_LIMIT = 1 << 20
# Seconds between looks at a client whose bytes are not read for now.
_GLANCE = 1.0
# Seconds that a client has to close when all is said.
_LINGER = 2.0


class Link(asyncio.BufferedProtocol):
    """``received`` is called with what comes; set it before there is a connection. ``lost`` is done at the end.

    ``buffer`` is READ_SIZE bytes that links of one loop may share: what is in it is taken before another reads.
    """

    def __init__(self, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self._held: set[object] = set()
        self._glance: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._buffer = buffer
        self.received: Callable[[bytes], None] = lambda _: None
        self.lost: asyncio.Future[None] = loop.create_future()
        self.used = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_LIMIT)
        # Kept: asyncio's TLS forgets it when the connection is lost.
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.used = self._loop.time()
        self.received(bytes(self._buffer[:count]))

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        self._wake()

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        self._wake()

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None
        self.release(self)

    def send(self, data: bytes) -> None:
        """Send, whether the client takes it or not: for what is small, or before :meth:`drained`."""
        if data and not self._transport.is_closing():
            self.used = self._loop.time()
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > ANSWER_LIMIT:
                self.hold(self)

    async def drained(self) -> None:
        """Wait until the client has taken enough. Raises ConnectionResetError where it is gone."""
        while self._room is not None:  # another that waited may have filled it again
            await asyncio.shield(self._room)
        if self._transport.is_closing():
            raise ConnectionResetError("the client is gone")

    def hold(self, who: object) -> None:
        """Read nothing more from the client until :meth:`release`: it has sent more than ``who`` can take."""
        if not self._held:
            self._transport.pause_reading()
            if self._glance is None and not self._gone():
                self._look()
        self._held.add(who)

    def release(self, who: object) -> None:
        """Undo a hold; without one it does nothing."""
        if who in self._held:
            self._held.remove(who)
            if not self._held and not self._transport.is_closing():
                self._transport.resume_reading()

    def _look(self) -> None:
        """A client that goes while nothing is read from it is not told of by the loop."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self._transport.abort()
        else:
            self._glance = self._loop.call_later(_GLANCE, self._look_again)

    def _look_again(self) -> None:
        self._glance = None
        if self._held and not self._gone():
            self._look()

    def _gone(self) -> bool:
        """Whether the socket is closed, which a connection over TLS is told of a little later."""
        return self.lost.done() or self._socket.fileno() < 0

    async def finish(self) -> None:
        """Close when all that was sent has been taken; what still comes is dropped.

        Not at once: closing with bytes unread would make the kernel throw away what is on its way out.
        """
        self.received = lambda _: None
        self._held.clear()
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self._transport.set_write_buffer_limits(high=1, low=0)
            if self._room is not None:
                await self._room
            if self._transport.can_write_eof():
                with suppress(OSError):  # the client has closed already
                    self._transport.write_eof()
            else:  # TLS has no half-close; its close waits for the client's
                self._transport.close()
        while not self.lost.done():
            await asyncio.wait({self.lost}, timeout=_LINGER)
            if self._gone() or not self._on_its_way():
                break
        self._transport.abort()

    def _on_its_way(self) -> bool:
        """Whether the kernel has bytes that the client has not acknowledged (tcp(7), SIOCOUTQ)."""
        (count,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        return bool(count)

    def abort(self) -> None:
        """Close at once; where there was no connection yet, it does nothing."""
        if hasattr(self, "_transport"):
            self._transport.abort()
