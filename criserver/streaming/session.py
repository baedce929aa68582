"""One connection to the streaming server: TLS, one request, the offer that it takes, and a clean end.

The server imports this module with the first connection. HTTP, SPDY and WebSocket take 1.6 MiB, and most nodes have
no client for days.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog

from criserver.errors import ResourceExhaustedError
from criserver.streaming import portforward, remotecommand
from criserver.streaming.client_link import END_TIMEOUT, READ_SIZE, ClientLink, UpgradedConnection
from criserver.streaming.command_session import serve_command
from criserver.streaming.forward_session import serve_forward
from criserver.streaming.handshake import Handshake, Refusal, Request, Upgrade
from criserver.streaming.offers import Command, Offer
from criserver.streaming.server_certificate import ServerCertificate

log = structlog.get_logger(__name__)

# Seconds for a client to send the head of its request.
HEAD_TIMEOUT = 10.0
# A view, because asyncio's TLS fills slices of it.
_buffer = memoryview(bytearray(READ_SIZE))


async def serve(
    sock: socket.socket,
    *,
    certificate: ServerCertificate | None,
    idle: float,
    take: Callable[[str], Offer | None],
) -> None:
    """Serve the connection on ``sock`` to its end, which comes after ``idle`` seconds without traffic too.

    ``take`` returns the offer of a token, None where there is none. It raises ResourceExhaustedError for too many
    clients.
    """
    link = ClientLink(_buffer)
    reader = _RequestReader(link)
    session = asyncio.current_task()
    assert session is not None
    idle_watch = asyncio.create_task(_end_when_idle(link, session, idle))
    try:
        if await _connect(sock, link, certificate):
            await _serve_request(link, reader, take)
            # A session that was cancelled does not wait long for its client.
            with suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT if session.cancelling() else None):
                    await link.finish()
    except ConnectionError:
        pass  # the client is gone
    except Exception as e:
        log.exception("a streaming session failed", error=str(e))
    finally:
        idle_watch.cancel()
        link.abort()


async def _connect(sock: socket.socket, link: ClientLink, certificate: ServerCertificate | None) -> bool:
    """Connect the link to the socket. False where the client failed in the TLS handshake or took too long."""
    limit = None if certificate is None else HEAD_TIMEOUT
    tls = None if certificate is None else await certificate.context()
    try:
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: link, sock, ssl=tls, ssl_handshake_timeout=limit
        )
    except OSError:
        return False
    return True


async def _end_when_idle(link: ClientLink, session: asyncio.Task[None], idle: float) -> None:
    loop = asyncio.get_running_loop()
    while (left := link.used + idle - loop.time()) > 0:
        await asyncio.sleep(left)
    log.info("a streaming connection was idle for too long", seconds=idle)
    link.idle = True
    session.cancel()


async def _serve_request(link: ClientLink, reader: _RequestReader, take: Callable[[str], Offer | None]) -> None:
    handshake = reader.handshake
    request = await reader.request()
    if request is None:
        return
    try:
        offer = take(request.path.rpartition("/")[2])
    except ResourceExhaustedError as e:
        link.send(handshake.refuse(503, str(e)))
        return
    if offer is None:
        text = "this address is not valid, or not any more: an address works once, and for a short time"
        link.send(handshake.refuse(404, text))
        return
    protocols = _protocols(offer, request.upgrade)
    protocol = remotecommand.negotiate(request.protocols, protocols)
    if protocol is None:
        link.send(handshake.refuse_protocols(protocols))
        return
    link.send(handshake.accept(protocol))
    connection = UpgradedConnection(link, request.upgrade, protocol, handshake.rest)
    await (serve_command(connection, offer) if isinstance(offer, Command) else serve_forward(connection, offer))


def _protocols(offer: Offer, upgrade: Upgrade) -> Sequence[str]:
    if isinstance(offer, Command):
        return tuple(remotecommand.SPDY_PROTOCOLS if upgrade is Upgrade.SPDY else remotecommand.WEBSOCKET_PROTOCOLS)
    return portforward.SPDY_PROTOCOLS if upgrade is Upgrade.SPDY else portforward.WEBSOCKET_PROTOCOLS


class _RequestReader:
    """Reads a client's request, from the first byte of the connection on."""

    def __init__(self, link: ClientLink) -> None:
        self.handshake = Handshake()
        self._link = link
        self._outcome: asyncio.Future[Request | Refusal] = asyncio.get_running_loop().create_future()
        link.received = self._received

    def _received(self, data: bytes) -> None:
        outcome = self.handshake.receive(data)
        if outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)
            self._link.hold(self.handshake)  # until the session reads the bytes behind the request

    async def request(self) -> Request | None:
        """The request; None where it was refused, or did not come in time. Raises ConnectionError."""
        link, outcome = self._link, self._outcome
        either: set[asyncio.Future[Any]] = {outcome, link.lost}
        await asyncio.wait(either, timeout=HEAD_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if link.lost.done():
            raise ConnectionResetError("the client is gone")
        link.release(self.handshake)
        if not outcome.done():
            link.send(self.handshake.refuse(408, f"the request did not come within {HEAD_TIMEOUT:g} s"))
            return None
        result = outcome.result()
        if isinstance(result, Refusal):
            link.send(result.response)
            return None
        return result
