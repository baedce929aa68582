"""What a connection tells its caller of what the peer has done."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.streaming.spdy.headers import Pairs


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer has opened a stream. ``ended``: it sends nothing on it; ``unidirectional``: nor may this side."""

    stream: int
    headers: Pairs
    ended: bool
    unidirectional: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The peer's attempt to open a stream was turned down."""

    stream: int
    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Replied:
    """The peer has accepted a stream of ours."""

    stream: int
    headers: Pairs
    ended: bool


@dataclass(frozen=True, slots=True)
class Headers:
    """More headers for an open stream."""

    stream: int
    headers: Pairs
    ended: bool


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a stream, which need not be a whole frame; empty only where the stream ends without more.

    ``data`` is a view of what was given to ``receive``, and changes with it where that is a buffer used again.
    """

    stream: int
    data: memoryview
    ended: bool


@dataclass(frozen=True, slots=True)
class Reset:
    """A stream is over in both directions: reset by the peer, or by us for the fault of the peer's in ``reason``."""

    stream: int
    status: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WindowGrown:
    """``send`` may carry more on this stream; stream 0 is the connection, and any stream may carry more."""

    stream: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The peer has answered the ping of this ID."""

    id: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer takes no new streams. Of ours it has taken those up to ``last``; the others are Reset before this."""

    last: int
    status: int


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The peer broke the protocol. Send what ``take`` gives and close the connection: no event follows this one."""

    status: int
    reason: str


Event = StreamOpened | Refused | Replied | Headers | Data | Reset | WindowGrown | Pong | GoneAway | ConnectionFailed
