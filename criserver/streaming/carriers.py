"""The streams of one client over its connection: streams of SPDY, or channels of a WebSocket, with one interface."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

import structlog

from criserver.streaming import spdy, websocket
from criserver.streaming.client_link import ClientLink
from criserver.streaming.spdy.headers import Pairs

log = structlog.get_logger(__name__)

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

    async def room(self) -> None:
        """Wait until more may be sent on any stream. Raises ConnectionError where the client is gone."""

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

    async def room(self) -> None:
        """Wait until more may be sent. Raises ConnectionResetError where the client is gone."""
        await self._carrier.room()

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


class _ReadLimits:
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


class SpdyCarrier:
    """Streams of SPDY/3.1, directly on a connection or in the tunnel of a WebSocket.

    ``opened`` is called with each stream that the client opens, and its headers. When it raises ValueError, the client
    made an error, and the stream is reset.
    """

    def __init__(
        self,
        link: ClientLink,
        opened: Callable[[ClientStream, Pairs], None],
        tunnel: websocket.Tunnel | None = None,
    ) -> None:
        self._link = link
        self._opened = opened
        self._tunnel = tunnel
        self._spdy = spdy.Connection()
        self._streams: dict[int, ClientStream] = {}
        self._read_limits = _ReadLimits(link)
        self._windows: dict[int, asyncio.Event] = {}
        link.received = self.receive if tunnel is None else self._receive_tunnelled
        link.lost.add_done_callback(lambda _: self._break_off())
        self._flush()

    async def send(self, stream: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._check(stream)
            room = self._spdy.window(stream)
            if room <= 0:
                window = self._windows.setdefault(stream, asyncio.Event())
                window.clear()
                await window.wait()
                continue
            self._spdy.send(stream, rest[:room])
            rest = rest[room:]
            self._flush()
            await self._link.drained()

    async def room(self) -> None:
        await self._link.drained()

    def _check(self, stream: int) -> None:
        if stream not in self._streams:
            raise ConnectionResetError("the client is gone, or has reset the stream")

    def end(self, stream: int) -> None:
        if stream in self._streams and self._spdy.state(stream)[0] is not spdy.Half.DONE:
            self._spdy.send(stream, b"", end=True)
            self._flush()
            self._forget_closed(stream)

    def _forget_closed(self, number: int) -> None:
        if self._spdy.state(number) == (spdy.Half.DONE, spdy.Half.DONE):
            self._forget(number)

    def _forget(self, number: int) -> ClientStream | None:
        if (window := self._windows.pop(number, None)) is not None:
            window.set()
        return self._streams.pop(number, None)

    def reset(self, stream: int) -> None:
        if self._forget(stream) is not None:
            self._spdy.reset(stream, spdy.Status.CANCEL)
            self._flush()

    def taken(self, stream: ClientStream, count: int) -> None:
        self._spdy.consumed(stream.number, count)
        self._flush()
        self._read_limits.shrink(stream, count)

    def close(self) -> None:
        """Tell the client that no more streams are accepted. Call the link's ``finish`` after it."""
        self._spdy.go_away()
        self._flush()
        if self._tunnel is not None:
            self._tunnel.close_all()
            self._link.send(self._tunnel.take())

    def receive(self, data: Buffer) -> None:
        """Handle bytes from the client."""
        for event in self._spdy.receive(data):
            match event:
                case spdy.Data(stream=number, data=piece, ended=ended):
                    if (stream := self._streams.get(number)) is None:
                        self._spdy.consumed(number, len(piece))
                    else:
                        if piece:
                            stream.feed(piece)
                            self._read_limits.grow(stream, len(piece))
                        if ended:
                            stream.finish()
                            self._forget_closed(number)
                case spdy.StreamOpened(stream=number, headers=headers, ended=ended):
                    self._open(number, headers, ended)
                case spdy.Reset(stream=number):
                    if (stream := self._forget(number)) is not None:
                        stream.break_off()
                case spdy.WindowGrown(stream=number):
                    for waiting in [number] if number else list(self._windows):
                        if (window := self._windows.get(waiting)) is not None:
                            window.set()
                case spdy.ConnectionFailed(reason=reason):
                    log.info("a streaming client broke the protocol", error=reason)
                    self._flush()
                    self._link.abort()
                    return
        self._flush()

    def _open(self, number: int, headers: Pairs, ended: bool) -> None:
        if self._spdy.state(number)[0] is not spdy.Half.SILENT:
            # The client has reset the stream already, or the server may not send on it: no protocol here needs that.
            self._spdy.reset(number, spdy.Status.REFUSED_STREAM)
            return
        stream = self._streams[number] = ClientStream(self, number)
        self._spdy.reply(number)
        if ended:
            stream.finish()
        try:
            self._opened(stream, headers)
        except ValueError:
            stream.reset()

    def _receive_tunnelled(self, data: bytes) -> None:
        assert self._tunnel is not None
        for event in self._tunnel.receive(data):
            match event:
                case websocket.TunnelData(data=piece):
                    self.receive(piece)
                case websocket.Closed():
                    self._link.send(self._tunnel.take())
                    self._link.abort()
                    return
        self._link.send(self._tunnel.take())

    def _flush(self) -> None:
        data = self._spdy.take()
        if data and self._tunnel is not None:
            self._tunnel.send(data)
            data = self._tunnel.take()
        self._link.send(data)

    def _break_off(self) -> None:
        for number in list(self._streams):
            if (stream := self._forget(number)) is not None:
                stream.break_off()


class ChannelCarrier:
    """The channels of a WebSocket. All streams exist from the beginning, by their numbers."""

    def __init__(
        self, link: ClientLink, protocol: str, *, readable: Collection[int], writable: Collection[int]
    ) -> None:
        self._link = link
        self._socket = websocket.Channels(protocol, readable=readable, writable=writable)
        self._read_limits = _ReadLimits(link)
        self.streams = {number: ClientStream(self, number) for number in {*readable, *writable}}
        link.received = self.receive
        link.lost.add_done_callback(lambda _: self._break_off())

    async def send(self, stream: int, data: bytes) -> None:
        self._socket.send(stream, data)
        self._link.send(self._socket.take())
        await self._link.drained()

    async def room(self) -> None:
        await self._link.drained()

    def end(self, stream: int) -> None:
        self._socket.close(stream)

    def reset(self, stream: int) -> None:
        self._socket.close(stream)

    def taken(self, stream: ClientStream, count: int) -> None:
        self._read_limits.shrink(stream, count)

    def close(self) -> None:
        """Begin to close. Call the link's ``finish`` after it."""
        self._socket.close_all()
        self._link.send(self._socket.take())

    def receive(self, data: bytes) -> None:
        """Handle bytes from the client."""
        for event in self._socket.receive(data):
            match event:
                case websocket.ChannelData(channel=number, data=piece):
                    stream = self.streams[number]
                    if not stream.broken:
                        stream.feed(piece)
                        self._read_limits.grow(stream, len(piece))
                case websocket.ChannelClosed(channel=number):
                    self.streams[number].finish()
                case websocket.Closed():
                    self._link.send(self._socket.take())
                    self._link.abort()
                    return
        self._link.send(self._socket.take())

    def _break_off(self) -> None:
        for stream in self.streams.values():
            stream.break_off()
