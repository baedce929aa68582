"""The events of a connection: what the peer has done."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.streaming.spdy.headers import Pairs


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer has opened a stream. ``ended``: the peer sends nothing on it. ``unidirectional``: nor may this side."""

    stream: int
    headers: Pairs
    ended: bool
    unidirectional: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The peer tried to open a stream, and it was refused."""

    stream: int
    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Replied:
    """The peer has accepted a stream of this side."""

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
    """A piece of a stream, which may be a part of a frame. It is empty only at the end of a stream.

    ``data`` is a view of the argument of ``receive``: it changes when the caller uses that buffer again.
    """

    stream: int
    data: memoryview
    ended: bool


@dataclass(frozen=True, slots=True)
class Reset:
    """A stream has ended in both directions: the peer reset it, or this side did for the peer's fault in ``reason``."""

    stream: int
    status: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WindowGrown:
    """``send`` may carry more on this stream. Stream 0 is the connection: any stream may carry more."""

    stream: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The peer has answered the ping of this ID."""

    id: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer accepts no new streams. It has accepted those of this side up to ``last``; the others had a Reset."""

    last: int
    status: int


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The peer broke the protocol. Send the bytes of ``take`` and close the connection: no event follows this one."""

    status: int
    reason: str


Event = StreamOpened | Refused | Replied | Headers | Data | Reset | WindowGrown | Pong | GoneAway | ConnectionFailed
