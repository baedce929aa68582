"""WebSocket connections after their handshake (RFC 6455): channels in messages, or a stream of bytes; no I/O.

:class:`Channels` speaks the sub-protocols of Kubernetes in which a message belongs to a channel, :class:`Tunnel` the
one that carries another protocol's bytes. Both take the peer's bytes, never raise on them, and give events; what they
have to say is fetched with ``take``. A message is handed on in the parts in which it comes, and never kept whole.
"""

from __future__ import annotations

import binascii
from collections.abc import Collection
from dataclasses import dataclass

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason

CLOSE_SIGNAL_PROTOCOL = "v5.channel.k8s.io"
BINARY_PROTOCOLS = frozenset({"", "channel.k8s.io", "v4.channel.k8s.io", CLOSE_SIGNAL_PROTOCOL})
BASE64_PROTOCOLS = frozenset({"base64.channel.k8s.io", "v4.base64.channel.k8s.io"})
TUNNEL_PROTOCOL = "SPDY/3.1+portforward.k8s.io"
"""The sub-protocol that :class:`Tunnel` is for."""

# A message of v5 that begins with it says that the client writes no more to the channel of its second byte.
_CLOSE_SIGNAL = 255
# The channels that v5 has: those of a command, its errors and its terminal's size.
_CLOSABLE = range(5)
# wsproto's cost for a byte doubles with pieces that do not stay in the processor's cache.
_PIECE = 64 << 10
# First bytes of a message that is one frame (RFC 6455, section 5.2).
_TEXT_FRAME, _BINARY_FRAME = b"\x81", b"\x82"


@dataclass(frozen=True, slots=True)
class ChannelData:
    """Bytes that the peer wrote to a channel."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ChannelClosed:
    """The peer writes no more to the channel."""

    channel: int


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a tunnel."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The last event: the peer has closed, or has broken the protocol.

    ``code`` is the peer's (1005 where it gave none), or the one that we close with. Send what there is to take, then
    close the connection.
    """

    code: int
    reason: str


Event = ChannelData | ChannelClosed | Data | Closed
_Message = TextMessage | BytesMessage
Buffer = bytes | bytearray | memoryview


class _PeerError(Exception):
    def __init__(self, code: CloseReason, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Socket:
    """What channels and tunnels share: frames, pings and the closing handshake.

    ``client`` is for tests: the daemon is never one.
    """

    def __init__(self, *, client: bool) -> None:
        self._wire = Connection(ConnectionType.CLIENT if client else ConnectionType.SERVER)
        self._client = client
        self._out: list[bytes] = []
        self._ping: bytes | None = None
        self._ended = False

    @property
    def open(self) -> bool:
        """Whether what is sent still goes out: neither side has closed."""
        return not self._ended and self._wire.state is ConnectionState.OPEN

    @property
    def ended(self) -> bool:
        """Whether the peer has closed or broken the protocol; nothing comes any more."""
        return self._ended

    def receive(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes; none after Closed. Never raises on what a peer sends."""
        events: list[Event] = []
        for start in range(0, len(data), _PIECE):
            if self._ended:
                break
            self._wire.receive_data(data[start : start + _PIECE])
            try:
                self._read(events)
            except _PeerError as e:
                self._end(events, e.code, str(e))
        return events

    def close_all(self, code: int = 1000, reason: str = "") -> None:
        """Begin to close, once; ``reason`` is cut to 123 bytes. The peer's answer is the event Closed."""
        if self.open:
            self._flush_pong()
            self._out.append(self._wire.send(CloseConnection(code, reason)))

    def take(self) -> bytes:
        """What is to be sent to the peer."""
        self._flush_pong()
        out = self._out
        self._out = []
        return out[0] if len(out) == 1 else b"".join(out)

    def _message(self, text: bool, head: bytes, data: Buffer) -> None:
        """Send one message of two parts; dropped when the peer would not see it any more."""
        if not self.open:
            return
        if self._client:
            payload = b"".join((head, data))
            message = TextMessage(payload.decode()) if text else BytesMessage(payload)
            self._out.append(self._wire.send(message))
            return
        # wsproto makes four copies of a payload on its way out; a frame of a server needs one.
        size = len(head) + len(data)
        if size < 126:
            length = size.to_bytes(1, "big")
        elif size < 1 << 16:
            length = b"\x7e" + size.to_bytes(2, "big")
        else:
            length = b"\x7f" + size.to_bytes(8, "big")
        self._out.append(b"".join((_TEXT_FRAME if text else _BINARY_FRAME, length, head, data)))

    def _read(self, events: list[Event]) -> None:
        for event in self._wire.events():
            match event:
                case TextMessage() | BytesMessage():
                    # What still comes after our own close is no longer wanted.
                    if self._wire.state is ConnectionState.OPEN:
                        self._part(event, events)
                case Ping(payload=payload):
                    # Only the latest ping needs an answer (section 5.5.3): a flood of them costs one pong.
                    self._ping = bytes(payload)
                case CloseConnection(code=code, reason=reason):
                    self._end(events, code, reason or "")
                    return

    def _part(self, message: _Message, events: list[Event]) -> None:
        raise NotImplementedError

    def _end(self, events: list[Event], code: int, reason: str) -> None:
        """The peer has closed, or a rule was broken: answer with the same code, unless we have closed ourselves."""
        if self._wire.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            self._flush_pong()
            self._out.append(self._wire.send(CloseConnection(code, reason)))
        self._ended = True
        events.append(Closed(int(code), reason))

    def _flush_pong(self) -> None:
        if self._ping is not None and self.open:
            self._out.append(self._wire.send(Pong(self._ping)))
        self._ping = None


class Channels(_Socket):
    """A connection whose messages belong to channels.

    ``readable`` are the channels that the peer may write to: data for others is dropped, as Kubernetes does, so that
    a client may write to a stream that was not asked for. ``writable`` are those that we may write to; likewise.
    """

    def __init__(
        self, subprotocol: str, *, readable: Collection[int], writable: Collection[int], client: bool = False
    ) -> None:
        """Raises ValueError for a sub-protocol without channels, and for a channel that it has no sign for."""
        super().__init__(client=client)
        if subprotocol not in BINARY_PROTOCOLS | BASE64_PROTOCOLS:
            raise ValueError(f"{subprotocol!r} is no sub-protocol with channels")
        self._base64 = subprotocol in BASE64_PROTOCOLS
        self._signals = subprotocol == CLOSE_SIGNAL_PROTOCOL
        if any(not 0 <= channel < channel_limit(subprotocol) for channel in (*readable, *writable)):
            raise ValueError(f"{subprotocol!r} has the channels 0 to {channel_limit(subprotocol) - 1} only")
        self._readable = set(readable)
        self._writable = set(writable)
        # Of the message that is being received; it has begun when its first byte has come.
        self._within = False
        self._channel: int | None = None
        self._signal: bytes | None = None
        self._quantum = b""
        self._padded = False

    def send(self, channel: int, data: Buffer) -> None:
        """Send one message, which may be empty. Dropped for a channel that we may not write to, and once closed."""
        if channel not in self._writable:
            return
        if self._base64:
            self._message(True, bytes((channel + 48,)), binascii.b2a_base64(data, newline=False))
        else:
            self._message(False, bytes((channel,)), data)

    def close(self, channel: int) -> None:
        """Write no more to a channel. Only v5 has a sign for it, and only for clients: a server's is not sent."""
        if channel in self._writable:
            self._writable.discard(channel)
            if self._signals and self._client:
                self._message(False, bytes((_CLOSE_SIGNAL, channel)), b"")

    def _part(self, message: _Message, events: list[Event]) -> None:
        # Kubernetes takes text and binary messages for the same.
        data = message.data.encode() if isinstance(message, TextMessage) else bytes(message.data)
        if not self._within and data:
            self._within = True
            data = self._begin(data)
        if self._signal is not None:
            self._signal += data
            if len(self._signal) > 1:
                raise _PeerError(CloseReason.PROTOCOL_ERROR, "a sign of closing names one channel")
        elif self._channel is not None:
            if self._base64:
                data = self._decoded(data, message.message_finished)
            if data:
                events.append(ChannelData(self._channel, data))
        if message.message_finished:
            if self._signal is not None:
                self._peer_closes(self._signal, events)
            self._within = False
            self._channel = self._signal = None

    def _begin(self, data: bytes) -> bytes:
        """Take a message's first byte, and return what is behind it."""
        first, rest = data[0], data[1:]
        if self._signals and first == _CLOSE_SIGNAL:
            self._signal = b""
            return rest
        channel = first - 48 if self._base64 else first
        self._channel = channel if channel in self._readable else None
        self._quantum, self._padded = b"", False
        return rest

    def _peer_closes(self, signal: bytes, events: list[Event]) -> None:
        if not signal or signal[0] not in _CLOSABLE:
            raise _PeerError(CloseReason.PROTOCOL_ERROR, "a sign of closing names no channel that there is")
        if signal[0] in self._readable:
            self._readable.discard(signal[0])
            events.append(ChannelClosed(signal[0]))

    def _decoded(self, data: bytes, last: bool) -> bytes:
        """The bytes that complete groups of four characters stand for; line breaks between them count for nothing."""
        if b"\n" in data or b"\r" in data:
            data = data.translate(None, b"\r\n")
        if self._quantum:
            data = self._quantum + data
        whole = len(data) & ~3
        self._quantum = data[whole:]
        if self._quantum and last:
            raise _PeerError(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "the base64 of a message ends too early")
        if not whole:
            return b""
        if self._padded:
            raise _PeerError(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "the base64 of a message goes on after its end")
        self._padded = data[whole - 1] == 0x3D
        try:
            return binascii.a2b_base64(data[:whole], strict_mode=True)
        except binascii.Error as e:
            raise _PeerError(CloseReason.INVALID_FRAME_PAYLOAD_DATA, f"a message is not base64: {e}") from None


class Tunnel(_Socket):
    """A connection whose binary messages are a stream of bytes; where one ends means nothing."""

    def __init__(self, *, client: bool = False) -> None:
        super().__init__(client=client)

    def send(self, data: Buffer) -> None:
        """Send one message. Dropped once closed."""
        self._message(False, b"", data)

    def _part(self, message: _Message, events: list[Event]) -> None:
        if isinstance(message, TextMessage):
            raise _PeerError(CloseReason.UNSUPPORTED_DATA, "a tunnel carries binary messages")
        if message.data:
            events.append(Data(bytes(message.data)))


def channel_limit(subprotocol: str) -> int:
    """How many channels a sub-protocol can name: in base64 their signs, from "0" on, stay ASCII."""
    return 80 if subprotocol in BASE64_PROTOCOLS else 255
