"""WebSocket connections after their handshake (RFC 6455): channels in messages, or a stream of bytes; no I/O.

:class:`Channels` has the sub-protocols of Kubernetes in which a message belongs to a channel. :class:`Tunnel` has the
one that carries the bytes of another protocol. ``receive`` takes the peer's bytes, never raises on them, and returns
events. ``take`` returns the bytes to send. A message is passed on in parts, as they arrive, and never kept whole.
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
"""The sub-protocol of :class:`Tunnel`."""

# The first byte of a close signal (v5): the client writes no more to the channel in the second byte.
_CLOSE_SIGNAL = 255
# The channels of v5: those of a command, its errors and the size of its terminal.
_CLOSABLE = range(5)
# Bytes that wsproto gets at once. Its cost for a byte doubles with pieces that do not fit the processor's cache.
_PIECE = 64 << 10
# The first byte of a message in one frame (RFC 6455, section 5.2).
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
class TunnelData:
    """Bytes of a tunnel."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The last event: the peer has closed, or has broken the protocol.

    ``code`` is the peer's (1005 where it gave none), or the one that this side closes with. Send the bytes of ``take``,
    then close the connection.
    """

    code: int
    reason: str


Event = ChannelData | ChannelClosed | TunnelData | Closed
_Message = TextMessage | BytesMessage
Buffer = bytes | bytearray | memoryview


class _PeerError(Exception):
    def __init__(self, code: CloseReason, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Socket:
    """The common part of channels and tunnels: frames, pings and the closing handshake.

    ``client`` is for tests alone: the daemon is always the server.
    """

    def __init__(self, *, client: bool) -> None:
        self._wire = Connection(ConnectionType.CLIENT if client else ConnectionType.SERVER)
        self._client = client
        self._out: list[bytes] = []
        self._ping: bytes | None = None
        self._ended = False

    @property
    def open(self) -> bool:
        """Whether this side can still send: neither side has closed."""
        return not self._ended and self._wire.state is ConnectionState.OPEN

    @property
    def ended(self) -> bool:
        """Whether the peer has closed or broken the protocol. No event comes any more."""
        return self._ended

    def receive(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes; none after Closed. Never raises, whatever a peer sends."""
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
        """The bytes to send to the peer."""
        self._flush_pong()
        out = self._out
        self._out = []
        return out[0] if len(out) == 1 else b"".join(out)

    def _message(self, text: bool, head: bytes, data: Buffer) -> None:
        """Send one message of two parts. It is dropped after either side has closed."""
        if not self.open:
            return
        if self._client:
            payload = b"".join((head, data))
            message = TextMessage(payload.decode()) if text else BytesMessage(payload)
            self._out.append(self._wire.send(message))
            return
        # The frame is made here: wsproto would copy the payload four times, and a server's frame needs one copy.
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
                    # Messages after this side has closed are dropped.
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
        """The peer has closed or broken a rule. Answer with the same code, unless this side has closed already."""
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

    ``readable`` are the channels that the peer may write to. Data for other channels is dropped, as in Kubernetes: a
    client may write to a stream that it did not request. ``writable`` are the channels that this side may write to;
    data for others is dropped too.
    """

    def __init__(
        self, subprotocol: str, *, readable: Collection[int], writable: Collection[int], client: bool = False
    ) -> None:
        """Raises ValueError for a sub-protocol without channels, and for a channel number that it cannot encode."""
        super().__init__(client=client)
        if subprotocol not in BINARY_PROTOCOLS | BASE64_PROTOCOLS:
            raise ValueError(f"{subprotocol!r} is no sub-protocol with channels")
        self._base64 = subprotocol in BASE64_PROTOCOLS
        self._signals = subprotocol == CLOSE_SIGNAL_PROTOCOL
        if any(not 0 <= channel < channel_limit(subprotocol) for channel in (*readable, *writable)):
            raise ValueError(f"{subprotocol!r} has the channels 0 to {channel_limit(subprotocol) - 1} only")
        self._readable = set(readable)
        self._writable = set(writable)
        # The state of the message that is being received. A message begins with its first byte.
        self._within = False
        self._channel: int | None = None
        self._signal: bytes | None = None
        self._quantum = b""
        self._padded = False

    def send(self, channel: int, data: Buffer) -> None:
        """Send one message, which may be empty. It is dropped for a channel that is not writable, and after a close."""
        if channel not in self._writable:
            return
        if self._base64:
            self._message(True, bytes((channel + 48,)), binascii.b2a_base64(data, newline=False))
        else:
            self._message(False, bytes((channel,)), data)

    def close(self, channel: int) -> None:
        """Write no more to a channel. Only v5 has a close signal, and only a client sends it."""
        if channel in self._writable:
            self._writable.discard(channel)
            if self._signals and self._client:
                self._message(False, bytes((_CLOSE_SIGNAL, channel)), b"")

    def _part(self, message: _Message, events: list[Event]) -> None:
        # Kubernetes treats text and binary messages alike.
        data = message.data.encode() if isinstance(message, TextMessage) else bytes(message.data)
        if not self._within and data:
            self._within = True
            data = self._begin(data)
        if self._signal is not None:
            self._signal += data
            if len(self._signal) > 1:
                raise _PeerError(CloseReason.PROTOCOL_ERROR, "a close signal names one channel")
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
        """Read the first byte of a message, and return the bytes behind it."""
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
            raise _PeerError(CloseReason.PROTOCOL_ERROR, "a close signal names an unknown channel")
        if signal[0] in self._readable:
            self._readable.discard(signal[0])
            events.append(ChannelClosed(signal[0]))

    def _decoded(self, data: bytes, last: bool) -> bytes:
        """Decode the complete groups of four characters; line breaks between them are ignored."""
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
    """A connection whose binary messages are a stream of bytes. The borders of messages have no meaning."""

    def __init__(self, *, client: bool = False) -> None:
        super().__init__(client=client)

    def send(self, data: Buffer) -> None:
        """Send one message. It is dropped after a close."""
        self._message(False, b"", data)

    def _part(self, message: _Message, events: list[Event]) -> None:
        if isinstance(message, TextMessage):
            raise _PeerError(CloseReason.UNSUPPORTED_DATA, "a tunnel carries binary messages")
        if message.data:
            events.append(TunnelData(bytes(message.data)))


def channel_limit(subprotocol: str) -> int:
    """How many channels a sub-protocol can encode: in base64 by characters from "0" on, which have to be ASCII."""
    return 80 if subprotocol in BASE64_PROTOCOLS else 255
