"""The state machine of a stream: two halves, one for what each side may send (SPDY Protocol Draft 3.1, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from criserver.streaming.spdy.frames import Status


class Half(IntEnum):
    """What one side of a stream may still send. A stream is closed, and forgotten, when both halves are DONE."""

    SILENT = 0  # it has to send SYN_REPLY before data
    OPEN = 1
    DONE = 2


class Sent(IntEnum):
    """What a side sends on an open stream. After a frame with FLAG_FIN, its half is DONE."""

    REPLY = 0
    HEADERS = 1
    DATA = 2


# The sender's half after a frame; or the status for a frame that is not allowed. The table holds for both sides: a
# frame of the peer gets an RST_STREAM with the status, a frame of this side raises LocalError.
RULES: Mapping[tuple[Half, Sent], Half | Status] = {
    (Half.SILENT, Sent.REPLY): Half.OPEN,
    (Half.SILENT, Sent.HEADERS): Half.SILENT,  # "at any time" (section 2.6.7)
    (Half.SILENT, Sent.DATA): Status.PROTOCOL_ERROR,  # section 2.2.2
    (Half.OPEN, Sent.REPLY): Status.STREAM_IN_USE,  # section 2.6.2
    (Half.OPEN, Sent.HEADERS): Half.OPEN,
    (Half.OPEN, Sent.DATA): Half.OPEN,
    (Half.DONE, Sent.REPLY): Status.STREAM_ALREADY_CLOSED,  # section 2.6.3
    (Half.DONE, Sent.HEADERS): Status.STREAM_ALREADY_CLOSED,
    (Half.DONE, Sent.DATA): Status.STREAM_ALREADY_CLOSED,  # section 2.3.6
}

REASONS = {
    (Half.SILENT, Sent.DATA): "data before SYN_REPLY",
    (Half.OPEN, Sent.REPLY): "SYN_REPLY for a stream that needs none",
    (Half.DONE, Sent.REPLY): "SYN_REPLY after the sender's end of the stream",
    (Half.DONE, Sent.HEADERS): "headers after the sender's end of the stream",
    (Half.DONE, Sent.DATA): "data after the sender's end of the stream",
}


class StreamState:
    """One stream: its halves, and its windows as differences to the initial ones."""

    __slots__ = ("balance", "credit", "id", "ours", "theirs")

    def __init__(self, stream: int, ours: Half, theirs: Half) -> None:
        self.id = stream
        self.ours = ours
        self.theirs = theirs
        self.balance = 0  # bytes that the peer has granted by WINDOW_UPDATE, less the bytes sent
        self.credit = 0  # bytes that are consumed and not yet granted to the peer again
