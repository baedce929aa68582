"""The stages of a stream, as a table that holds for both sides (ttrpc's PROTOCOL.md, "Streaming")."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from criserver.ttrpc.message_frames import MessageFlag


class Stage(Enum):
    """What may still be sent on a stream."""

    UNARY = auto()  # the server's response alone
    SERVER_SENDS = auto()  # the client has sent all of its data
    BOTH_SEND = auto()
    ENDED = auto()  # nothing: the stream is forgotten


class Step(Enum):
    """What one side sends on a stream. An END is a DATA frame with REMOTE_CLOSED."""

    CLIENT_DATA = auto()
    CLIENT_END = auto()
    SERVER_DATA = auto()
    SERVER_END = auto()
    RESPONSE = auto()


# The stage after a step; a text for a step that is not allowed. A stream ends as soon as the server has ended it, also
# while the client may still send: the server's end is the outcome of the call.
RULES: Mapping[tuple[Stage, Step], Stage | str] = {
    (Stage.UNARY, Step.CLIENT_DATA): "data on a stream of one request and one response",
    (Stage.UNARY, Step.CLIENT_END): "data on a stream of one request and one response",
    (Stage.UNARY, Step.SERVER_DATA): "data on a stream of one request and one response",
    (Stage.UNARY, Step.SERVER_END): "data on a stream of one request and one response",
    (Stage.UNARY, Step.RESPONSE): Stage.ENDED,
    (Stage.SERVER_SENDS, Step.CLIENT_DATA): "data after the client's end of the stream",
    (Stage.SERVER_SENDS, Step.CLIENT_END): "data after the client's end of the stream",
    (Stage.SERVER_SENDS, Step.SERVER_DATA): Stage.SERVER_SENDS,
    (Stage.SERVER_SENDS, Step.SERVER_END): Stage.ENDED,
    (Stage.SERVER_SENDS, Step.RESPONSE): Stage.ENDED,
    (Stage.BOTH_SEND, Step.CLIENT_DATA): Stage.BOTH_SEND,
    (Stage.BOTH_SEND, Step.CLIENT_END): Stage.SERVER_SENDS,
    (Stage.BOTH_SEND, Step.SERVER_DATA): Stage.BOTH_SEND,
    (Stage.BOTH_SEND, Step.SERVER_END): Stage.ENDED,
    (Stage.BOTH_SEND, Step.RESPONSE): Stage.ENDED,
}

# The first stage, by the flags of the request. Both flags together contradict each other.
FIRST: Mapping[int, Stage] = {
    0: Stage.UNARY,
    MessageFlag.REMOTE_CLOSED: Stage.SERVER_SENDS,
    MessageFlag.REMOTE_OPEN: Stage.BOTH_SEND,
}
