"""Flow control of a connection and its streams (SPDY Protocol Draft 3.1, section 2.6.8).

There are two directions: the peer's windows limit this side, and the windows of this side limit the peer. It begins
only when the peer uses it, or with ``announce``; the module ``connection`` has the reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from criserver.streaming.spdy.frames import (
    DEFAULT_WINDOW,
    MAX_WINDOW,
    ConnectionFault,
    GoAwayStatus,
    Setting,
    Status,
    StreamFault,
    Type,
    settings,
    two_words,
)
from criserver.streaming.spdy.states import Half, StreamState

_DONE = Half.DONE  # an attribute of an Enum costs too much for each frame of data


class FlowControl:
    """The windows of one connection. Frames to send are appended to ``out``."""

    __slots__ = ("_balance", "_bounded", "_credit", "_granting", "_initial", "_max_streams", "_out", "_window", "held")

    def __init__(self, window: int, max_streams: int, out: list[bytes | memoryview]) -> None:
        """``window`` and ``max_streams`` are the settings that this side announces."""
        self._window = window
        self._max_streams = max_streams
        self._out = out
        # The peer's windows.
        self._bounded = False
        self._initial = DEFAULT_WINDOW
        self._balance = DEFAULT_WINDOW
        # The windows of this side.
        self._granting = False
        self._credit = 0
        self.held = 0  # bytes in Data events that are not consumed yet

    def begin(self, streams: Iterable[StreamState]) -> None:
        """The peer uses flow control: keep to its windows, and announce the windows of this side."""
        self._bounded = True
        self.begin_grants(streams)

    def begin_grants(self, streams: Iterable[StreamState]) -> None:
        """Announce the windows of this side, and grant bytes from now on."""
        if self._granting:
            return
        self._granting = True
        self._out.append(
            settings({Setting.MAX_CONCURRENT_STREAMS: self._max_streams, Setting.INITIAL_WINDOW_SIZE: self._window})
        )
        # The peer may have kept to its windows all the time. Then it has sent at most one default window.
        self._credit = min(self._credit, DEFAULT_WINDOW) + max(0, self._window - DEFAULT_WINDOW)
        self.restore(0)
        for stream in streams:
            stream.credit = min(stream.credit, DEFAULT_WINDOW)
            if stream.credit:
                self._grant(stream)

    def room(self, stream: StreamState) -> int:
        """The bytes that may be sent on a stream, below 0 where the peer has reduced its window."""
        return min(self._initial + stream.balance, self._balance) if self._bounded else MAX_WINDOW

    def sent(self, stream: StreamState, size: int) -> None:
        """This side has sent ``size`` bytes."""
        stream.balance -= size
        self._balance -= size

    def set_initial(self, initial: int) -> bool:
        """The peer sets the initial window of its streams. Returns whether it has grown."""
        grown = initial > self._initial
        self._initial = initial
        return grown

    def grow_connection(self, delta: int) -> None:
        """The peer grants ``delta`` bytes on the connection. Raises ConnectionFault."""
        if not delta:
            raise ConnectionFault(GoAwayStatus.PROTOCOL_ERROR, "a WINDOW_UPDATE of 0 bytes")
        if self._balance + delta > MAX_WINDOW:
            raise ConnectionFault(GoAwayStatus.FLOW_CONTROL_ERROR, f"a window of more than {MAX_WINDOW} bytes")
        self._balance += delta

    def grow_stream(self, stream: StreamState, delta: int) -> None:
        """The peer grants ``delta`` bytes on a stream. Raises StreamFault."""
        if not delta:
            raise StreamFault(Status.PROTOCOL_ERROR, "a WINDOW_UPDATE of 0 bytes")
        if self._initial + stream.balance + delta > MAX_WINDOW:
            raise StreamFault(Status.FLOW_CONTROL_ERROR, f"a window of more than {MAX_WINDOW} bytes")
        stream.balance += delta

    def consumed(self, stream: StreamState | None, count: int) -> None:
        """The caller has passed on or dropped ``count`` held bytes. ``stream`` is None where it has ended."""
        self.held -= count
        if stream is not None and stream.theirs is not _DONE:
            stream.credit += count
            if self._granting and stream.credit * 2 >= self._window:
                self._grant(stream)
        self.restore(count)

    def restore(self, count: int) -> None:
        """Grant bytes of the connection's window again, half a window at a time."""
        self._credit += count
        if self._granting and self._credit * 2 >= max(self._window, DEFAULT_WINDOW):
            self._out.append(two_words(Type.WINDOW_UPDATE, 0, self._credit))
            self._credit = 0

    def _grant(self, stream: StreamState) -> None:
        self._out.append(two_words(Type.WINDOW_UPDATE, stream.id, stream.credit))
        stream.credit = 0
