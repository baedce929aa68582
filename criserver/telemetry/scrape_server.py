"""The HTTP endpoint of metrics: ``GET /metrics`` on one address, a connection for each request.

Every process of the node can connect to a port on loopback. So the number of connections, the size of a request and the
time of each connection have limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable

import h11
import structlog

from criserver.errors import CriError

log = structlog.get_logger(__name__)

# Connections at a time. Prometheus has one.
MAX_CONNECTIONS = 16
# Bytes of a request with its headers.
_MAX_REQUEST = 8 << 10
# Seconds for a connection, from its first byte to its last.
_TIMEOUT = 10.0
# Seconds between two answers with metrics, which take the event loop some milliseconds each.
_PAUSE = 0.1
_PATH = b"/metrics"
_TEXT = "text/plain; charset=utf-8"


class ScrapeServer:
    """Serves what ``render`` returns, with ``content_type``, on ``address``: HOST:PORT, or unix:// and a path."""

    def __init__(self, address: str, render: Callable[[], Awaitable[bytes]], content_type: str) -> None:
        self._address = address
        self._render = render
        self._content_type = content_type
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._next = 0.0  # when metrics may be rendered again, in seconds of time.monotonic()

    async def run(self) -> None:
        """Serve until cancelled. Raises CriError where the address cannot be bound. A unix socket is for root alone."""
        await self.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.stop()

    async def start(self) -> None:
        """Listen. Raises CriError where the address cannot be bound."""
        try:
            if path := self._socket_path():
                os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
                self._server = await asyncio.start_unix_server(self._connected, sock=_bound(path), limit=_MAX_REQUEST)
            else:
                host, _, port = self._address.rpartition(":")
                self._server = await asyncio.start_server(
                    self._connected, host.strip("[]"), int(port), limit=_MAX_REQUEST
                )
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) else None
            raise CriError(f"metrics: cannot listen on {self._address}: {reason or e}") from e

    def port(self) -> int:
        """The port that it listens on; for tests, which ask for any port by 0."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening, and end all connections."""
        if self._server is None:
            return
        self._server.close()
        if path := self._socket_path():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def _socket_path(self) -> str:
        return self._address.removeprefix("unix://") if self._address.startswith("unix://") else ""

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_REQUEST)
        try:
            async with asyncio.timeout(_TIMEOUT):
                request = await _request(http, reader)
                if request is not None:
                    status, content_type, body = await self._answer(request)
                    writer.write(_response(http, request, status, content_type, body))
                # The client has to get what was written. Until then it has its place among MAX_CONNECTIONS.
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, h11.RemoteProtocolError):
            pass  # the client is slow, gone, or speaks no HTTP
        except Exception as e:
            log.exception("metrics cannot be served", error=str(e))
        finally:
            writer.transport.abort()

    async def _answer(self, request: h11.Request) -> tuple[int, str, bytes]:
        if request.target.partition(b"?")[0] != _PATH:
            return 404, _TEXT, b"metrics are at /metrics\n"
        if request.method not in (b"GET", b"HEAD"):
            return 405, _TEXT, b"only GET and HEAD are served\n"
        async with self._turn:
            # A program of the node that asks without end must not keep the daemon from its other work.
            await asyncio.sleep(self._next - time.monotonic())
            body = await self._render()
            self._next = time.monotonic() + _PAUSE
        return 200, self._content_type, body


def _bound(path: str) -> socket.socket:
    """A unix socket at ``path`` for root alone, in the place of an old one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    bound = socket.socket(socket.AF_UNIX)
    try:
        # The mode of the file that bind makes. The umask would do the same to files of other threads and tasks.
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(path)
    except BaseException:
        bound.close()
        raise
    return bound


async def _request(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The request; None where the client has sent none. Raises h11.RemoteProtocolError."""
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(_MAX_REQUEST))
    return event if isinstance(event, h11.Request) else None


def _response(http: h11.Connection, request: h11.Request, status: int, content_type: str, body: bytes) -> bytes:
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Connection", "close")]
    if status == 405:
        headers.append(("Allow", "GET, HEAD"))
    sent = http.send(h11.Response(status_code=status, headers=headers)) or b""
    if request.method != b"HEAD":
        sent += http.send(h11.Data(data=body)) or b""
    return sent + (http.send(h11.EndOfMessage()) or b"")
