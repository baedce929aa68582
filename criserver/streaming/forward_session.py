"""Port forwarding: the forwarded connections of one client, each to a port of the pod."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

import structlog

from criserver.errors import CriError
from criserver.streaming import copying, portforward, websocket
from criserver.streaming.carriers import ChannelCarrier, SpdyCarrier
from criserver.streaming.client_link import STREAMS_TIMEOUT, UpgradedConnection
from criserver.streaming.client_stream import ClientStream
from criserver.streaming.handshake import Upgrade
from criserver.streaming.offers import Forward
from criserver.streaming.spdy.headers import Pairs
from criserver.text import status

log = structlog.get_logger(__name__)


async def serve_forward(connection: UpgradedConnection, forward: Forward) -> None:
    """Serve forwarded connections until the client goes, or until no more can come."""
    tasks: set[asyncio.Task[None]] = set()

    def carry(port: int, data: ClientStream, error: ClientStream, greeting: bytes = b"") -> None:
        task = asyncio.create_task(_carry(forward, port, data, error, greeting))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    try:
        if connection.upgrade is Upgrade.SPDY or connection.protocol == websocket.TUNNEL_PROTOCOL:
            _forward_streams(connection, carry)
            await asyncio.wait({connection.link.lost})
        else:
            carrier = _forward_channels(connection, forward.ports, carry)
            if tasks:
                await connection.link.while_connected(asyncio.wait(tasks))
            carrier.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _forward_streams(connection: UpgradedConnection, carry: Callable[[int, ClientStream, ClientStream], None]) -> None:
    """SPDY: each pair of streams that the client opens is one forwarded connection."""
    pairs = portforward.StreamPairs()
    waiting: dict[int, ClientStream] = {}
    timers: dict[str, asyncio.TimerHandle] = {}
    loop = asyncio.get_running_loop()

    def opened(stream: ClientStream, headers: Pairs) -> None:
        try:
            pair = pairs.add(stream.number, headers)
        except CriError as e:
            raise ValueError(str(e)) from e
        waiting[stream.number] = stream
        if pair.data is not None and pair.error is not None:
            timers.pop(pair.key).cancel()
            carry(pair.port, waiting.pop(pair.data), waiting.pop(pair.error))
        else:
            timers[pair.key] = loop.call_later(STREAMS_TIMEOUT, expire, pair)

    def expire(pair: portforward.StreamPair) -> None:
        del timers[pair.key]
        if pairs.expire(pair):
            for number in (pair.data, pair.error):
                if number is not None:
                    waiting.pop(number).reset()

    tunnel = websocket.Tunnel() if connection.upgrade is Upgrade.WEBSOCKET else None
    SpdyCarrier(connection.link, opened, tunnel)
    connection.link.received(connection.rest)


def _forward_channels(
    connection: UpgradedConnection,
    ports: Sequence[int],
    carry: Callable[[int, ClientStream, ClientStream, bytes], None],
) -> ChannelCarrier:
    """Plain WebSocket: each of the request's ports has two channels, which are one forwarded connection."""
    readable, writable = portforward.websocket_channels(ports)
    carrier = ChannelCarrier(connection.link, connection.protocol, readable=readable, writable=writable)
    carrier.receive(connection.rest)
    for number, port in enumerate(ports):
        carry(port, carrier.streams[2 * number], carrier.streams[2 * number + 1], portforward.greeting(port))
    return carrier


async def _carry(forward: Forward, port: int, data: ClientStream, error: ClientStream, greeting: bytes) -> None:
    """Carry one connection between a client and a port of the pod.

    A client of a plain WebSocket gets a ``greeting`` first on both streams. That client cannot tell the end of one
    connection, only the end of all.
    """
    try:
        if greeting:
            await data.write(greeting)
            await error.write(greeting)
        try:
            sock = await forward.dial(port)
        except CriError as e:
            log.info("a port cannot be forwarded", port=port, error=str(e))
            await error.write(status(str(e)).encode())
            return
        with sock:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(_send_all(data, sock))
                await copying.OutputCopier(sock.fileno(), data).run()
                data.close()
                # Kubernetes' clients before 1.30 end their side of the data only after the error stream has ended.
                error.close()
                if greeting:
                    sending.cancel()
    except* ConnectionError:
        pass  # the client is gone, or has reset the stream
    except* Exception as e:
        log.exception("a forwarded connection failed", port=port, error=str(e.exceptions[0]))
    finally:
        for stream in (error, data):
            stream.close()
            stream.reset()


async def _send_all(data: ClientStream, sock: socket.socket) -> None:
    await copying.copy_in(data, sock.fileno())
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is closed already
