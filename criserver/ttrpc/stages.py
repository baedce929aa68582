"""The stages of a stream, as a table that holds for both sides (ttrpc's PROTOCOL.md, "Streaming")."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from criserver.ttrpc.message_frames import MessageFlag


class StreamStage(Enum):
    """What may still be sent on a stream."""

    UNARY = auto()  # the server's response alone
    SERVER_SENDS = auto()  # the client has sent all of its data
    BOTH_SEND = auto()
    ENDED = auto()  # nothing: the stream is forgotten


class StreamStep(Enum):
    """What one side sends on a stream. An END is a DATA frame with REMOTE_CLOSED."""

    CLIENT_DATA = auto()
    CLIENT_END = auto()
    SERVER_DATA = auto()
    SERVER_END = auto()
    RESPONSE = auto()


# The stage after a step; a text for a step that is not allowed. A stream ends as soon as the server has ended it, also
# while the client may still send: the server's end is the outcome of the call.
RULES: Mapping[tuple[StreamStage, StreamStep], StreamStage | str] = {
    (StreamStage.UNARY, StreamStep.CLIENT_DATA): "data on a stream of one request and one response",
    (StreamStage.UNARY, StreamStep.CLIENT_END): "data on a stream of one request and one response",
    (StreamStage.UNARY, StreamStep.SERVER_DATA): "data on a stream of one request and one response",
    (StreamStage.UNARY, StreamStep.SERVER_END): "data on a stream of one request and one response",
    (StreamStage.UNARY, StreamStep.RESPONSE): StreamStage.ENDED,
    (StreamStage.SERVER_SENDS, StreamStep.CLIENT_DATA): "data after the client's end of the stream",
    (StreamStage.SERVER_SENDS, StreamStep.CLIENT_END): "data after the client's end of the stream",
    (StreamStage.SERVER_SENDS, StreamStep.SERVER_DATA): StreamStage.SERVER_SENDS,
    (StreamStage.SERVER_SENDS, StreamStep.SERVER_END): StreamStage.ENDED,
    (StreamStage.SERVER_SENDS, StreamStep.RESPONSE): StreamStage.ENDED,
    (StreamStage.BOTH_SEND, StreamStep.CLIENT_DATA): StreamStage.BOTH_SEND,
    (StreamStage.BOTH_SEND, StreamStep.CLIENT_END): StreamStage.SERVER_SENDS,
    (StreamStage.BOTH_SEND, StreamStep.SERVER_DATA): StreamStage.BOTH_SEND,
    (StreamStage.BOTH_SEND, StreamStep.SERVER_END): StreamStage.ENDED,
    (StreamStage.BOTH_SEND, StreamStep.RESPONSE): StreamStage.ENDED,
}

# The first stage, by the flags of the request. Both flags together contradict each other.
FIRST: Mapping[int, StreamStage] = {
    0: StreamStage.UNARY,
    MessageFlag.REMOTE_CLOSED: StreamStage.SERVER_SENDS,
    MessageFlag.REMOTE_OPEN: StreamStage.BOTH_SEND,
}
