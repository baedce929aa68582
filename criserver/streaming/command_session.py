"""Exec and attach: one command on the streams of one client."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from criserver.errors import CriError, words_of
from criserver.streaming import remotecommand
from criserver.streaming.carriers import ChannelCarrier, SpdyCarrier
from criserver.streaming.client_link import END_TIMEOUT, STREAMS_TIMEOUT, UpgradedConnection
from criserver.streaming.client_stream import ClientStream
from criserver.streaming.handshake import Upgrade
from criserver.streaming.offers import Command, CommandStreams
from criserver.streaming.remotecommand import ProtocolFeatures, RequestedStreams, StreamType
from criserver.streaming.spdy.headers import Pairs
from criserver.text import status

log = structlog.get_logger(__name__)

_STOPPED = "the daemon is being stopped, and has ended this command or attachment; the container goes on"
_IDLE = "this command or attachment was ended, as nothing moved on its connection for streaming.idle_timeout"


async def serve_command(connection: UpgradedConnection, command: Command) -> None:
    """Run a command on the client's streams and tell the client how the command ended.

    If this is cancelled while the command runs, the command is cancelled, and the client is told so.
    """
    carrier: SpdyCarrier | ChannelCarrier
    if connection.upgrade is Upgrade.SPDY:
        features = remotecommand.SPDY_PROTOCOLS[connection.protocol]
        carrier, streams = await _spdy_streams(connection, command.requested, features)
    else:
        features = remotecommand.WEBSOCKET_PROTOCOLS[connection.protocol]
        readable, writable = command.requested.websocket_channels()
        carrier = ChannelCarrier(connection.link, connection.protocol, readable=readable, writable=writable)
        streams = {StreamType(number): stream for number, stream in carrier.streams.items()}
        carrier.receive(connection.rest)
        await streams[command.requested.greeting_channel()].write(b"")
    limit = None
    try:
        message = await connection.link.while_connected(_end_message(command, streams, features))
    except asyncio.CancelledError:
        # Over SPDY, a client takes a connection that ends without a status for a success.
        words = _IDLE if connection.link.idle else _STOPPED
        message, limit = remotecommand.failure_message(words, features), END_TIMEOUT
    if message:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await streams[StreamType.ERROR].write(message)
    for stream in streams.values():
        stream.close()
    carrier.close()


async def _spdy_streams(
    connection: UpgradedConnection, requested: RequestedStreams, features: ProtocolFeatures
) -> tuple[SpdyCarrier, dict[StreamType, ClientStream]]:
    """The streams of a command, when the client has opened them all. Raises ConnectionError where it does not."""
    expected = requested.spdy_streams(features)
    streams: dict[StreamType, ClientStream] = {}
    complete = asyncio.Event()

    def opened(stream: ClientStream, headers: Pairs) -> None:
        try:
            stream_type = remotecommand.stream_type(headers)
        except CriError as e:
            raise ValueError(str(e)) from e
        if stream_type in streams or stream_type not in expected:
            raise ValueError(f"a {stream_type.header} stream is not expected")
        streams[stream_type] = stream
        if streams.keys() == expected:
            complete.set()

    carrier = SpdyCarrier(connection.link, opened)
    carrier.receive(connection.rest)
    try:
        async with asyncio.timeout(STREAMS_TIMEOUT):
            await connection.link.while_connected(complete.wait())
    except TimeoutError:
        missing = ", ".join(stream_type.header for stream_type in expected - streams.keys())
        raise ConnectionAbortedError(f"the client did not open its streams: {missing}") from None
    return carrier, streams


async def _end_message(command: Command, streams: dict[StreamType, ClientStream], features: ProtocolFeatures) -> bytes:
    """Run the command; the message of its end for the error stream."""
    types = (StreamType.STDIN, StreamType.STDOUT, StreamType.STDERR, StreamType.RESIZE)
    try:
        code = await command.run(CommandStreams(*map(streams.get, types)))
    except CriError as e:
        log.info("a streamed command failed", error=str(e))
        return remotecommand.failure_message(status(str(e)), features)
    except ConnectionError:
        raise  # the client is gone
    except Exception as e:
        log.exception("a streamed command failed", error=str(e))
        return remotecommand.failure_message(status(f"{type(e).__name__}: {words_of(e)}"), features)
    return remotecommand.exit_message(code, features)
