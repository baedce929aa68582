"""ttrpc with any bytes from the peer and any calls; ``check`` is one input."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from criserver.ttrpc.call_messages import decode_answer, decode_call
from criserver.ttrpc.call_streams import (
    MAX_STREAMS,
    CallStreams,
    DataCame,
    Oversized,
    ProtocolBroken,
    Requested,
    Responded,
    StreamMisuseError,
)
from criserver.ttrpc.message_frames import HEAD, MAX_PAYLOAD, MessageReader, MessageType, message_frame
from criserver.ttrpc.stages import StreamStage
from criserver.ttrpc.statuses import CallError


class Session:
    """One connection, and what must hold of it."""

    def __init__(self, *, client: bool) -> None:
        self.client = client
        self.streams = CallStreams(client=client)
        self.failed = False

    def receive(self, wire: bytes) -> None:
        events = self.streams.receive(wire)
        assert not (self.failed and events), "events after the failure"
        for event in events:
            assert not self.failed
            match event:
                case Requested(stream, payload):
                    assert not self.client
                    assert stream % 2 == 1
                    self.decode(payload)
                case Responded(stream, payload):
                    assert self.client
                    assert self.streams.stage(stream) is StreamStage.ENDED
                    self.decode(payload)
                case DataCame(stream, payload):
                    assert stream % 2 == 1
                    assert len(payload or b"") <= MAX_PAYLOAD
                case Oversized(_, size):
                    assert size > MAX_PAYLOAD
                case ProtocolBroken(reason):
                    assert reason
                    self.failed = True
        assert len(self.streams._reader._partial) <= MAX_PAYLOAD
        assert self.client or len(self.streams.streams) <= MAX_STREAMS
        assert StreamStage.ENDED not in map(self.streams.stage, self.streams.streams)

    def decode(self, payload: bytes) -> None:
        for decode in (decode_call, decode_answer):
            try:
                decode(payload)
            except (CallError, DecodeError):
                pass

    def act(self, what: int, stream: int, payload: bytes) -> None:
        before = self.streams.streams
        try:
            match what % 5:
                case 0:
                    self.streams.request(payload, what // 5 % 4)
                case 1:
                    self.streams.respond(stream, payload)
                case 2:
                    self.streams.send(stream, payload, end=what // 5 % 2 == 1)
                case 3:
                    self.streams.send(stream, None, end=True)
                case _:
                    self.streams.abandon(stream)
        except StreamMisuseError:
            assert self.streams.streams == before
            assert self.streams.take() == b""
        # What is sent can be read.
        for frame in MessageReader().read(memoryview(self.streams.take())):
            assert frame.data is not None
            assert frame.stream % 2 == 1


def check(content: bytes) -> None:
    """One input. Raises AssertionError, or what the protocol raised, if something does not hold."""
    session = Session(client=bool(content[:1] and content[0] & 1))
    at = 1
    while at + 4 <= len(content):
        what, stream, flags, size = content[at : at + 4]
        part = content[at + 4 : at + 4 + size % 64]
        at += 4 + len(part)
        if what < 64:
            session.receive(part)
        elif what < 160:
            session.receive(message_frame(MessageType(1 + what % 3), stream, part, flags % 8))
        elif what < 164:
            session.receive(HEAD.pack(MAX_PAYLOAD + size + 1, stream, 1 + flags % 3, 0) + bytes(MAX_PAYLOAD + size + 1))
        else:
            session.act(what, stream, part)
