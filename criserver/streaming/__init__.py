"""Exec, attach and port-forward, over SPDY/3.1 and WebSocket."""

from criserver.streaming.copying import ClientSink, ClientSource, OutputCopier, copy_in, discard, ready
from criserver.streaming.offers import Command, CommandStreams, Forward
from criserver.streaming.remotecommand import RequestedStreams
from criserver.streaming.server import StreamingServer
from criserver.streaming.server_certificate import ServerCertificate

__all__ = [
    "ClientSink",
    "ClientSource",
    "Command",
    "CommandStreams",
    "Forward",
    "OutputCopier",
    "RequestedStreams",
    "ServerCertificate",
    "StreamingServer",
    "copy_in",
    "discard",
    "ready",
]
