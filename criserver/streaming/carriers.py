"""The streams of one client over its connection: streams of SPDY, or channels of a WebSocket, with one interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import structlog

from criserver.streaming import spdy, websocket
from criserver.streaming.client_link import WRITE_LIMIT, ClientLink
from criserver.streaming.client_stream import Buffer, ClientStream, ReadLimits
from criserver.streaming.spdy.headers import Pairs

log = structlog.get_logger(__name__)


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
        self._read_limits = ReadLimits(link)
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
                await self._wait_for_window(stream)
                continue
            self._spdy.send(stream, rest[:room])
            rest = rest[room:]
            self._flush()
            await self._link.drained()

    async def room(self, stream: int) -> int:
        while True:
            await self._link.drained()
            self._check(stream)
            if (room := self._spdy.window(stream)) > 0:
                return room
            await self._wait_for_window(stream)

    async def _wait_for_window(self, stream: int) -> None:
        window = self._windows.setdefault(stream, asyncio.Event())
        window.clear()
        await window.wait()

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
        self._read_limits = ReadLimits(link)
        self.streams = {number: ClientStream(self, number) for number in {*readable, *writable}}
        link.received = self.receive
        link.lost.add_done_callback(lambda _: self._break_off())

    async def send(self, stream: int, data: bytes) -> None:
        self._socket.send(stream, data)
        self._link.send(self._socket.take())
        await self._link.drained()

    async def room(self, stream: int) -> int:  # noqa: ARG002 - all channels of a WebSocket share its room
        await self._link.drained()
        return WRITE_LIMIT

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
