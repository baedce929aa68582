"""The streams of a connection: every step at every stage, on both sides, and what a peer may not do."""

from __future__ import annotations

import pytest

from criserver.ttrpc import call_streams, stages
from criserver.ttrpc.call_streams import (
    CallStreams,
    DataCame,
    Oversized,
    OversizedMessageError,
    ProtocolBroken,
    Requested,
    Responded,
    StreamEvent,
    StreamMisuseError,
)
from criserver.ttrpc.message_frames import HEAD, MAX_PAYLOAD, MessageFlag, MessageType, message_frame
from criserver.ttrpc.stages import StreamStage, StreamStep

FLAGS = {
    StreamStage.UNARY: 0,
    StreamStage.SERVER_SENDS: MessageFlag.REMOTE_CLOSED,
    StreamStage.BOTH_SEND: MessageFlag.REMOTE_OPEN,
}

# The stage before, what is sent, and the stage after it; None for a step that the specification forbids.
TABLE: list[tuple[StreamStage, StreamStep, StreamStage | None]] = [
    (StreamStage.UNARY, StreamStep.CLIENT_DATA, None),
    (StreamStage.UNARY, StreamStep.CLIENT_END, None),
    (StreamStage.UNARY, StreamStep.SERVER_DATA, None),
    (StreamStage.UNARY, StreamStep.SERVER_END, None),
    (StreamStage.UNARY, StreamStep.RESPONSE, StreamStage.ENDED),
    (StreamStage.SERVER_SENDS, StreamStep.CLIENT_DATA, None),
    (StreamStage.SERVER_SENDS, StreamStep.CLIENT_END, None),
    (StreamStage.SERVER_SENDS, StreamStep.SERVER_DATA, StreamStage.SERVER_SENDS),
    (StreamStage.SERVER_SENDS, StreamStep.SERVER_END, StreamStage.ENDED),
    (StreamStage.SERVER_SENDS, StreamStep.RESPONSE, StreamStage.ENDED),
    (StreamStage.BOTH_SEND, StreamStep.CLIENT_DATA, StreamStage.BOTH_SEND),
    (StreamStage.BOTH_SEND, StreamStep.CLIENT_END, StreamStage.SERVER_SENDS),
    (StreamStage.BOTH_SEND, StreamStep.SERVER_DATA, StreamStage.BOTH_SEND),
    (StreamStage.BOTH_SEND, StreamStep.SERVER_END, StreamStage.ENDED),
    (StreamStage.BOTH_SEND, StreamStep.RESPONSE, StreamStage.ENDED),
]
IDS = [f"{before.name}-{step.name}" for before, step, _ in TABLE]
CLIENTS = (StreamStep.CLIENT_DATA, StreamStep.CLIENT_END)


def test_the_table_has_every_step() -> None:
    assert {(before, step) for before, step, _ in TABLE} == set(stages.RULES)
    assert len(TABLE) == 3 * len(StreamStep)


def opened(stage: StreamStage, *, client: bool) -> CallStreams:
    """One side of a connection whose stream 1 is at this stage."""
    streams = CallStreams(client=client)
    if client:
        streams.request(b"q", FLAGS[stage])
        streams.take()
    else:
        streams.receive(message_frame(MessageType.REQUEST, 1, b"q", FLAGS[stage]))
    assert streams.stage(1) is stage
    return streams


def step_frame(step: StreamStep) -> bytes:
    kind = MessageType.RESPONSE if step is StreamStep.RESPONSE else MessageType.DATA
    return message_frame(kind, 1, b"x", 1 if step in (StreamStep.CLIENT_END, StreamStep.SERVER_END) else 0)


@pytest.mark.parametrize(("before", "step", "after"), TABLE, ids=IDS)
def test_what_the_peer_sends(before: StreamStage, step: StreamStep, after: StreamStage | None) -> None:
    streams = opened(before, client=step not in CLIENTS)
    events = streams.receive(step_frame(step))
    expected: list[StreamEvent]
    if after is None:
        assert isinstance(events[0], ProtocolBroken)
        assert streams.streams == ()
        assert streams.receive(step_frame(step)) == [], "no event follows a fault"
        return
    ended = step in (StreamStep.CLIENT_END, StreamStep.SERVER_END)
    expected = [Responded(1, b"x") if step is StreamStep.RESPONSE else DataCame(1, b"x", ended)]
    assert events == expected
    assert streams.stage(1) is after


@pytest.mark.parametrize(("before", "step", "after"), TABLE, ids=IDS)
def test_what_this_side_sends(before: StreamStage, step: StreamStep, after: StreamStage | None) -> None:
    streams = opened(before, client=step in CLIENTS)

    def act() -> None:
        if step is StreamStep.RESPONSE:
            streams.respond(1, b"x")
        else:
            streams.send(1, b"x", end=step in (StreamStep.CLIENT_END, StreamStep.SERVER_END))

    if after is None:
        with pytest.raises(StreamMisuseError, match="stream 1"):
            act()
        assert (streams.take(), streams.stage(1)) == (b"", before)
    else:
        act()
        assert streams.take() == step_frame(step)
        assert streams.stage(1) is after


def test_ids_of_a_client_are_odd_and_grow() -> None:
    streams = CallStreams(client=True)
    assert [streams.request(b"") for _ in range(3)] == [1, 3, 5]


@pytest.mark.parametrize("stage", FLAGS)
def test_a_request_says_whether_it_is_unary(stage: StreamStage) -> None:
    frame = message_frame(MessageType.REQUEST, 9, b"q", FLAGS[stage])
    assert CallStreams(client=False).receive(frame) == [Requested(9, b"q", stage is StreamStage.UNARY)]


def test_an_end_without_a_message() -> None:
    streams = opened(StreamStage.BOTH_SEND, client=True)
    streams.send(1, None, end=True)
    frame = streams.take()
    assert frame == HEAD.pack(0, 1, 3, 5)
    assert opened(StreamStage.BOTH_SEND, client=False).receive(frame) == [DataCame(1, None, True)]


def test_what_comes_for_a_stream_that_has_ended_is_ignored() -> None:
    client = opened(StreamStage.UNARY, client=True)
    client.abandon(1)
    assert client.receive(message_frame(MessageType.RESPONSE, 1, b"late")) == []
    server = opened(StreamStage.BOTH_SEND, client=False)
    server.respond(1, b"")
    assert server.receive(message_frame(MessageType.DATA, 1, b"late")) == []


REQUEST, RESPONSE, DATA = MessageType.REQUEST, MessageType.RESPONSE, MessageType.DATA
FAULTS = [
    (False, message_frame(REQUEST, 2, b""), "stream 2"),
    (False, message_frame(REQUEST, 0, b""), "stream 0"),
    (False, message_frame(REQUEST, 5, b"") + message_frame(REQUEST, 5, b""), "after stream 5"),
    (False, message_frame(REQUEST, 5, b"") + message_frame(REQUEST, 3, b""), "after stream 5"),
    (False, message_frame(REQUEST, 1, b"", 3), "both"),
    (False, message_frame(RESPONSE, 1, b""), "response of a client"),
    (False, message_frame(DATA, 7, b""), "never opened"),
    (True, message_frame(REQUEST, 2, b""), "request of a server"),
    (True, message_frame(RESPONSE, 1, b""), "never opened"),
    (True, message_frame(DATA, 4, b""), "never opened"),
]


@pytest.mark.parametrize(("client", "wire", "reason"), FAULTS)
def test_faults_of_the_peer(client: bool, wire: bytes, reason: str) -> None:
    streams = CallStreams(client=client)
    fault = streams.receive(wire)[-1]
    assert isinstance(fault, ProtocolBroken)
    assert reason in fault.reason
    with pytest.raises(StreamMisuseError):
        streams.request(b"")


def test_a_client_cannot_open_streams_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_streams, "MAX_STREAMS", 3)
    streams = CallStreams(client=False)
    for stream in (1, 3, 5):
        assert streams.receive(message_frame(REQUEST, stream, b"")) == [Requested(stream, b"", True)]
    assert isinstance(streams.receive(message_frame(REQUEST, 7, b""))[0], ProtocolBroken)


def test_a_message_above_the_limit() -> None:
    wire = HEAD.pack(MAX_PAYLOAD + 1, 1, 1, 0) + bytes(MAX_PAYLOAD + 1)
    server = CallStreams(client=False)
    assert server.receive(wire) == [Oversized(1, MAX_PAYLOAD + 1)]
    server.respond(1, b"no")
    client = opened(StreamStage.UNARY, client=True)
    wire = HEAD.pack(MAX_PAYLOAD + 1, 1, 2, 0) + bytes(MAX_PAYLOAD + 1)
    assert client.receive(wire) == [Oversized(1, MAX_PAYLOAD + 1)]
    assert client.streams == ()
    with pytest.raises(OversizedMessageError):
        client.request(bytes(MAX_PAYLOAD + 1))
    assert client.take() == b""


def test_what_a_side_may_not_send() -> None:
    client, server = opened(StreamStage.BOTH_SEND, client=True), CallStreams(client=False)
    with pytest.raises(StreamMisuseError):
        client.respond(1, b"")
    with pytest.raises(StreamMisuseError):
        client.send(1, None)
    with pytest.raises(StreamMisuseError):
        client.request(b"", 3)
    with pytest.raises(StreamMisuseError):
        server.request(b"")
    with pytest.raises(StreamMisuseError, match="not open"):
        server.respond(1, b"")


def test_ids_come_to_an_end() -> None:
    streams = CallStreams(client=True)
    streams._last = 0xFFFFFFFD
    assert streams.request(b"") == 0xFFFFFFFF
    with pytest.raises(StreamMisuseError, match="used up"):
        streams.request(b"")
