"""One client's connection: it reads and sends at the client's pace, and closes without losing bytes."""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from criserver.streaming.handshake import Upgrade

# Bytes of one read. This bounds how long one client keeps the loop busy: a read of tiny frames costs a millisecond for
# each KiB.
READ_SIZE = 64 << 10
# Bytes that may wait for the client before a writer has to wait. The kernel's buffer comes on top.
WRITE_LIMIT = 256 << 10
# Bytes that may wait for the client before its bytes are not read any more: for a client that asks for answers and does
# not read them.
ANSWER_LIMIT = 1 << 20
# Seconds for a client to open all streams of a command, or both of a forwarded connection.
STREAMS_TIMEOUT = 30.0
# Seconds for a client to take its last bytes when the server stops, or the connection was idle for too long.
END_TIMEOUT = 2.0
# Seconds between two checks whether a client is still there while its bytes are not read.
_CHECK_INTERVAL = 1.0
# Seconds that a client has to close the connection, or to acknowledge more bytes, at the end.
_LINGER = 2.0


@dataclass(frozen=True, slots=True)
class UpgradedConnection:
    """A connection after its handshake: ``protocol`` is the one agreed on, "" for none (WebSocket alone).

    ``rest`` are the bytes that came behind the request.
    """

    link: ClientLink
    upgrade: Upgrade
    protocol: str
    rest: bytes


class ClientLink(asyncio.BufferedProtocol):
    """One client's connection. ``received`` is called with the client's bytes: set it before there is a connection.

    ``lost`` is done when the connection is closed. ``used`` is the loop's time of the last traffic; ``idle`` tells that
    the session is being ended for it. ``buffer`` has READ_SIZE bytes. All links of one loop may share it: a link takes
    its bytes out before another link reads.
    """

    def __init__(self, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self._held: set[object] = set()
        self._check_timer: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._buffer = buffer
        self.received: Callable[[bytes], None] = lambda _: None
        self.lost: asyncio.Future[None] = loop.create_future()
        self.used = loop.time()
        self.idle = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_LIMIT)
        # Kept here, because asyncio's TLS forgets it when the connection is lost.
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
        """Send without waiting for the client: for few bytes, or followed by :meth:`drained`."""
        if data and not self._transport.is_closing():
            self.used = self._loop.time()
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > ANSWER_LIMIT:
                self.hold(self)

    async def drained(self) -> None:
        """Wait until the client has read enough. Raises ConnectionResetError where it is gone."""
        while self._room is not None:  # another writer may have filled the buffer again
            await asyncio.shield(self._room)
        if self._transport.is_closing():
            raise ConnectionResetError("the client is gone")

    def hold(self, holder: object) -> None:
        """Stop reading from the client until :meth:`release`: it has sent more than ``holder`` can keep."""
        if not self._held:
            self._transport.pause_reading()
            if self._check_timer is None and not self._gone():
                self._check_client()
        self._held.add(holder)

    def release(self, holder: object) -> None:
        """Undo a hold; without one it does nothing."""
        if holder in self._held:
            self._held.remove(holder)
            if not self._held and not self._transport.is_closing():
                self._transport.resume_reading()

    def _check_client(self) -> None:
        """Abort where the client is gone: the loop does not notice that while nothing is read."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP)
        if poll.poll(0):
            self._transport.abort()
        else:
            self._check_timer = self._loop.call_later(_CHECK_INTERVAL, self._check_again)

    def _check_again(self) -> None:
        self._check_timer = None
        if self._held and not self._gone():
            self._check_client()

    def _gone(self) -> bool:
        """Whether the socket is closed. Over TLS ``lost`` is done a little later than that."""
        return self.lost.done() or self._socket.fileno() < 0

    async def finish(self) -> None:
        """Close when the client has received all bytes; bytes that still come from it are dropped.

        Not at once: a close with unread bytes makes the kernel discard the bytes that are still to be sent.
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
            else:  # TLS has no half-close; its close waits for the client's close
                self._transport.close()
        while not self.lost.done():
            await asyncio.wait({self.lost}, timeout=_LINGER)
            if self._gone() or not self._has_unacknowledged():
                break
        self._transport.abort()

    def _has_unacknowledged(self) -> bool:
        """Whether the kernel has bytes that the client has not acknowledged (tcp(7), SIOCOUTQ)."""
        (count,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        return bool(count)

    async def while_connected(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of ``work``. When the client goes, ``work`` is cancelled. Raises ConnectionResetError then."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self.lost}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ConnectionResetError("the client is gone")
        finally:
            if not task.done():
                task.cancel()
                # Not asyncio.wait: the exception of a cancelled task must be fetched, or asyncio logs it.
                await asyncio.gather(task, return_exceptions=True)

    def abort(self) -> None:
        """Close at once. It does nothing where there was no connection yet."""
        if hasattr(self, "_transport"):
            self._transport.abort()
