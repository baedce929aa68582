"""One stream of a client, and how many of its unread bytes are kept."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from criserver.streaming.client_link import ClientLink

Buffer = bytes | bytearray | memoryview

# Bytes from the client that may wait to be read: for one stream, and for all streams of a connection. One read may pass
# the limit; then the connection is not read until enough is taken.
STREAM_LIMIT = 128 << 10
CONNECTION_LIMIT = 1 << 20
# Bytes. A smaller piece is copied: a view would keep the memory of the whole read.
_LARGE = 16 << 10


class Carrier(Protocol):
    """Carries streams over a connection."""

    async def send(self, stream: int, data: bytes) -> None:
        """Send, and wait until more may be sent. Raises ConnectionError where the client or its stream is gone."""

    async def room(self, stream: int) -> int:
        """Wait until more may be sent on a stream, and return how many bytes.

        Raises ConnectionError where the client or its stream is gone.
        """

    def end(self, stream: int) -> None:
        """Tell the client that the server sends nothing more on a stream."""

    def reset(self, stream: int) -> None:
        """End a stream at once, in both directions."""

    def taken(self, stream: ClientStream, count: int) -> None:
        """``count`` bytes of the stream are not in memory any more: they were read or dropped."""


class ClientStream:
    """One stream of a client: ``read`` gives the client's bytes, ``write`` sends to the client."""

    def __init__(self, carrier: Carrier, number: int) -> None:
        self._carrier = carrier
        self._pieces: deque[Buffer] = deque()
        self._more: asyncio.Event = asyncio.Event()
        self._ended = False
        self.broken = False  # no more reads or writes
        self.number = number
        self.kept = 0

    async def read(self) -> Buffer:
        """The next bytes of the client, b"" at the end. Raises ConnectionResetError where the client is gone."""
        while not self._pieces:
            if self.broken:
                raise ConnectionResetError("the client is gone")
            if self._ended:
                return b""
            self._more.clear()
            await self._more.wait()
        data = self._pieces.popleft()
        self.kept -= len(data)
        self._carrier.taken(self, len(data))
        return data

    async def room(self) -> int:
        """Wait until more may be sent, and return how many bytes. Raises ConnectionError where the client is gone."""
        return await self._carrier.room(self.number)

    async def write(self, data: bytes) -> None:
        """Send, and wait until more may be sent. Raises ConnectionResetError where the client is gone."""
        if self.broken:
            raise ConnectionResetError("the client is gone")
        await self._carrier.send(self.number, data)

    def close(self) -> None:
        """Write no more. The client's bytes can still be read."""
        self._carrier.end(self.number)

    def reset(self) -> None:
        """End the stream at once, in both directions."""
        self._carrier.reset(self.number)
        self.break_off()

    def feed(self, data: Buffer) -> None:
        """Keep bytes of the client for ``read``."""
        last = self._pieces[-1] if self._pieces else None
        if len(data) >= _LARGE:
            self._pieces.append(data)
        elif isinstance(last, bytearray) and len(last) < _LARGE:
            last += data
        else:
            self._pieces.append(bytearray(data))
        self.kept += len(data)
        self._more.set()

    def finish(self) -> None:
        """The client sends nothing more."""
        self._ended = True
        self._more.set()

    def break_off(self) -> None:
        """The stream is gone: drop the unread bytes, and refuse to send."""
        self.broken = True
        self._pieces.clear()
        dropped, self.kept = self.kept, 0
        self._carrier.taken(self, dropped)
        self._more.set()


class ReadLimits:
    """Stops reading a connection while too many of its bytes wait in memory."""

    def __init__(self, link: ClientLink) -> None:
        self._link = link
        self._total = 0

    def grow(self, stream: ClientStream, count: int) -> None:
        self._total += count
        if stream.kept > STREAM_LIMIT:
            self._link.hold(stream)
        if self._total > CONNECTION_LIMIT:
            self._link.hold(self)

    def shrink(self, stream: ClientStream, count: int) -> None:
        self._total -= count
        if stream.kept <= STREAM_LIMIT:
            self._link.release(stream)
        if self._total <= CONNECTION_LIMIT:
            self._link.release(self)
