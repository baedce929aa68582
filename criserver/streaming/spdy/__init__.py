"""SPDY/3.1 without I/O, for either side of a connection.

connection = Connection()
for event in connection.receive(received_bytes):
    match event:
        case StreamOpened(stream, headers):
            connection.reply(stream)
        case Data(stream, data, ended):
            ...  # pass it on, and then
            connection.consumed(stream, len(data))
transport.write(connection.take())
"""

from __future__ import annotations

from criserver.streaming.spdy.connection import Connection, SpdyLimits
from criserver.streaming.spdy.connection_events import (
    ConnectionFailed,
    Data,
    Event,
    GoneAway,
    Headers,
    Pong,
    Refused,
    Replied,
    Reset,
    StreamOpened,
    WindowGrown,
)
from criserver.streaming.spdy.frames import MAX_WINDOW, GoAwayStatus, LocalError, Status
from criserver.streaming.spdy.states import Half

__all__ = [
    "MAX_WINDOW",
    "Connection",
    "ConnectionFailed",
    "Data",
    "Event",
    "GoAwayStatus",
    "GoneAway",
    "Half",
    "Headers",
    "LocalError",
    "Pong",
    "Refused",
    "Replied",
    "Reset",
    "SpdyLimits",
    "Status",
    "StreamOpened",
    "WindowGrown",
]
