"""Exec, attach and port-forward, over SPDY/3.1 and WebSocket."""

from criserver.streaming.pipes import Outflow, Sink, Source, copy_in, discard, ready
from criserver.streaming.remotecommand import Wanted
from criserver.streaming.server import Command, Forward, StreamingServer, Streams

__all__ = [
    "Command",
    "Forward",
    "Outflow",
    "Sink",
    "Source",
    "StreamingServer",
    "Streams",
    "Wanted",
    "copy_in",
    "discard",
    "ready",
]
