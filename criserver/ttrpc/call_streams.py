"""ttrpc without I/O: bytes in, events out, and the bytes to send (ttrpc's PROTOCOL.md).

The client opens streams, with odd IDs that only grow. A server opens none. The protocol has no flow control, no ping
and no cancellation: the caller limits its memory by not reading its socket.
"""

from __future__ import annotations

from dataclasses import dataclass

from criserver.ttrpc.message_frames import (
    MAX_PAYLOAD,
    MAX_STREAM,
    MessageFault,
    MessageFlag,
    MessageFrame,
    MessageReader,
    MessageType,
    message_frame,
)
from criserver.ttrpc.stages import FIRST, RULES, StreamStage, StreamStep

MAX_STREAMS = 4096
"""The streams that a client may have open at a server."""


class StreamMisuseError(Exception):
    """The protocol does not allow the call; nothing was sent."""


class OversizedMessageError(StreamMisuseError):
    """The message is larger than MAX_PAYLOAD; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Requested:
    """A client has opened a stream. ``unary``: it expects one response, and sends no more."""

    stream: int
    payload: bytes
    unary: bool


@dataclass(frozen=True, slots=True)
class Responded:
    """The server has answered, and the stream has ended."""

    stream: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class DataCame:
    """A message on a stream; None is no message. ``ended``: it is the sender's last."""

    stream: int
    payload: bytes | None
    ended: bool


@dataclass(frozen=True, slots=True)
class Oversized:
    """A message of ``size`` bytes was skipped. A server has to respond; at a client the stream has ended."""

    stream: int
    size: int


@dataclass(frozen=True, slots=True)
class ProtocolBroken:
    """The peer broke the protocol. Close the connection: no event follows this one."""

    reason: str


StreamEvent = Requested | Responded | DataCame | Oversized | ProtocolBroken


class CallStreams:
    """One side of a connection. No method blocks or does I/O.

    A method that makes a frame raises StreamMisuseError where the role, the stream's stage or the size forbids it, and
    has changed nothing then.
    """

    __slots__ = ("_client", "_failed", "_last", "_out", "_reader", "_streams")

    def __init__(self, *, client: bool) -> None:
        self._client = client
        self._streams: dict[int, StreamStage] = {}
        self._last = 0 if not client else -1  # the newest stream: every request has a higher ID
        self._reader = MessageReader()
        self._out: list[bytes] = []
        self._failed = False

    @property
    def streams(self) -> tuple[int, ...]:
        """The streams that have not ended."""
        return tuple(self._streams)

    def stage(self, stream: int) -> StreamStage:
        """What may still be sent on a stream; ENDED for one that is not there."""
        return self._streams.get(stream, StreamStage.ENDED)

    def request(self, payload: bytes, flags: int = 0) -> int:
        """Open a stream, and return its ID. ``flags`` is REMOTE_OPEN, REMOTE_CLOSED, or 0 for a unary call."""
        if not self._client or self._failed or flags not in FIRST:
            raise StreamMisuseError("this side cannot open a stream of this kind")
        stream = self._last + 2
        if stream > MAX_STREAM:
            raise StreamMisuseError("the connection has used up its stream IDs")
        self._frame(MessageType.REQUEST, stream, payload, flags)
        self._last, self._streams[stream] = stream, FIRST[flags]
        return stream

    def respond(self, stream: int, payload: bytes) -> None:
        """Answer a request, and end its stream."""
        if self._client:
            raise StreamMisuseError("a client does not respond")
        after = self._allowed(stream, StreamStep.RESPONSE)
        self._frame(MessageType.RESPONSE, stream, payload)
        self._move(stream, after)

    def send(self, stream: int, payload: bytes | None, *, end: bool = False) -> None:
        """Send a message on a stream that is not unary. None is no message, and needs ``end``."""
        if payload is None and not end:
            raise StreamMisuseError("nothing to send")
        after = self._allowed(stream, _data_step(self._client, end))
        flags = (MessageFlag.REMOTE_CLOSED if end else 0) | (MessageFlag.NO_DATA if payload is None else 0)
        self._frame(MessageType.DATA, stream, payload or b"", flags)
        self._move(stream, after)

    def abandon(self, stream: int) -> None:
        """Forget a stream. What the server still sends on it is ignored. The protocol does not tell the server."""
        self._streams.pop(stream, None)

    def take(self) -> bytes:
        """The bytes to send now, b"" for none."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes | bytearray | memoryview) -> list[StreamEvent]:
        """The events in the peer's bytes. A fault of the peer is an event, and is never raised."""
        events: list[StreamEvent] = []
        if self._failed:
            return events
        try:
            for frame in self._reader.read(memoryview(data)):
                self._take_frame(frame, events)
        except MessageFault as fault:
            self._failed = True
            self._streams.clear()
            events.append(ProtocolBroken(str(fault)))
        return events

    def _take_frame(self, frame: MessageFrame, events: list[StreamEvent]) -> None:
        if frame.kind == MessageType.REQUEST:
            self._requested(frame, events)
            return
        if frame.kind == MessageType.RESPONSE and not self._client:
            raise MessageFault("a response of a client")
        stage = self._streams.get(frame.stream)
        if stage is None:
            # It may have been sent before the sender knew that the stream has ended here.
            if frame.stream % 2 != 1 or frame.stream > self._last:
                raise MessageFault(f"a message for stream {frame.stream}, which was never opened")
            return
        if frame.data is None:
            if self._client:
                self.abandon(frame.stream)
            events.append(Oversized(frame.stream, frame.size))
            return
        ended = frame.kind == MessageType.DATA and frame.flags & MessageFlag.REMOTE_CLOSED != 0
        after = RULES[
            stage, StreamStep.RESPONSE if frame.kind == MessageType.RESPONSE else _data_step(not self._client, ended)
        ]
        if isinstance(after, str):
            raise MessageFault(f"stream {frame.stream}: {after}")
        self._move(frame.stream, after)
        if frame.kind == MessageType.RESPONSE:
            events.append(Responded(frame.stream, frame.data))
        else:
            events.append(DataCame(frame.stream, None if frame.flags & MessageFlag.NO_DATA else frame.data, ended))

    def _requested(self, frame: MessageFrame, events: list[StreamEvent]) -> None:
        if self._client:
            raise MessageFault("a request of a server")
        if frame.stream % 2 != 1 or frame.stream <= self._last:
            raise MessageFault(f"stream {frame.stream} cannot be opened after stream {self._last}")
        if len(self._streams) >= MAX_STREAMS:
            raise MessageFault(f"more than {MAX_STREAMS} open streams")
        stage = FIRST.get(frame.flags & (MessageFlag.REMOTE_CLOSED | MessageFlag.REMOTE_OPEN))
        if stage is None:
            raise MessageFault(f"stream {frame.stream} is opened both with data and without")
        self._last, self._streams[frame.stream] = frame.stream, stage
        if frame.data is None:
            events.append(Oversized(frame.stream, frame.size))
        else:
            events.append(Requested(frame.stream, frame.data, stage is StreamStage.UNARY))

    def _allowed(self, stream: int, step: StreamStep) -> StreamStage:
        stage = self._streams.get(stream)
        if stage is None:
            raise StreamMisuseError(f"stream {stream} is not open")
        after = RULES[stage, step]
        if isinstance(after, str):
            raise StreamMisuseError(f"stream {stream}: {after}")
        return after

    def _move(self, stream: int, after: StreamStage) -> None:
        if after is StreamStage.ENDED:
            del self._streams[stream]
        else:
            self._streams[stream] = after

    def _frame(self, kind: MessageType, stream: int, payload: bytes, flags: int = 0) -> None:
        if len(payload) > MAX_PAYLOAD:
            raise OversizedMessageError(f"a message of {len(payload)} bytes is larger than {MAX_PAYLOAD}")
        self._out.append(message_frame(kind, stream, payload, flags))


def _data_step(client: bool, end: bool) -> StreamStep:
    if client:
        return StreamStep.CLIENT_END if end else StreamStep.CLIENT_DATA
    return StreamStep.SERVER_END if end else StreamStep.SERVER_DATA
