"""The streaming server: it serves the addresses that CRI's Exec, Attach and PortForward give out.

Kubernetes' clients connect through the kubelet, crictl connects directly. Each connection is upgraded to SPDY/3.1 or to
WebSocket. The offer behind the address decides what happens with the streams: this room knows no containers.
"""

from __future__ import annotations

import asyncio
import importlib
import resource
import socket
from functools import partial
from types import ModuleType

import structlog

from criserver.errors import CriError, ResourceExhaustedError, words_of
from criserver.streaming.offers import Command, Offer, Offers
from criserver.streaming.server_certificate import ServerCertificate
from snapshotter.tasks import outlive
from snapshotter.threads import in_loose_thread

log = structlog.get_logger(__name__)

# Accepted connections are those that have taken an offer: at most so many at once. Each may cost a few MiB: what its
# client has sent, and what its client has not read yet.
MAX_ACCEPTED = 1000
# Pending connections are all others: no request yet, or none with a valid address. The kubelet and every process of the
# node connect from 127.0.0.1, so a limit by peer cannot tell them apart. The newest connection replaces the oldest
# pending one. A real client sends its request at once, and is accepted before so many others can connect.
MAX_PENDING = 512
# The parts of the daemon's descriptors that both may take: an accepted client has about a dozen. The rest is for the
# daemon, which has to serve its own socket too.
_ACCEPTED_SHARE, _PENDING_SHARE = 32, 8
_BACKLOG = 1024
# Connections that are accepted in one turn of the loop.
_ACCEPTS = 16
# Seconds until the server accepts again when no descriptor or memory was left, and between two log lines about closed
# connections.
_ACCEPT_PAUSE = 1.0
_LOG_PAUSE = 60.0


class StreamingServer:
    """Serves on one TCP address; :meth:`offer` gives out the address at which a client takes an offer.

    A connection without traffic for ``idle`` seconds is closed.
    """

    def __init__(self, host: str, port: int, *, certificate: ServerCertificate | None = None, idle: float) -> None:
        self._host = host
        self._port = port
        self._certificate = certificate
        self._idle = idle
        self._offers = Offers()
        self._loading: asyncio.Future[ModuleType] | None = None
        self._listeners: list[socket.socket] = []
        self._sessions: set[asyncio.Task[None]] = set()
        self._pending: dict[asyncio.Task[None], None] = {}  # a part of the sessions, the oldest first
        self._max_accepted = MAX_ACCEPTED
        self._max_pending = MAX_PENDING
        self._unlogged_drops = 0
        self._last_log = -_LOG_PAUSE
        self._base = ""

    async def start(self) -> None:
        """Listen. Raises CriError where the address is in use or does not belong to this node."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors != resource.RLIM_INFINITY:
            self._max_accepted = min(MAX_ACCEPTED, descriptors // _ACCEPTED_SHARE)
            self._max_pending = min(MAX_PENDING, descriptors // _PENDING_SHARE)
        try:
            await self._listen()
        except OSError as e:
            self._unlisten()
            raise CriError(f"streaming: cannot listen on {self._host}:{self._port}: {e.strerror or e}") from e
        host, port = self._listeners[0].getsockname()[:2]
        # The kubelet is on this node: it reaches a server that listens on all addresses at the loopback address.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not listened on
        scheme = "http" if self._certificate is None else "https"
        self._base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(infos):
            listener = socket.create_server(address, family=family, backlog=_BACKLOG)
            listener.setblocking(False)
            self._listeners.append(listener)
        for listener in self._listeners:
            loop.add_reader(listener, self._accept, listener)

    def _unlisten(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    async def stop(self) -> None:
        """Stop listening, and end all connections. The clients of commands are told so."""
        self._unlisten()
        for session in self._sessions:
            session.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)

    @property
    def clients(self) -> int:
        """How many clients have taken an offer and are connected."""
        return len(self._sessions) - len(self._pending)

    def offer(self, offer: Offer) -> str:
        """The URL at which one client may take the offer, once. Raises ResourceExhaustedError."""
        kind = "command" if isinstance(offer, Command) else "portforward"
        return f"{self._base}/{kind}/{self._offers.add(offer)}"

    def _accept(self, listener: socket.socket) -> None:
        """Accept new connections. asyncio's own server does not report a client over TLS before its handshake."""
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTS):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                log.error("streaming: no connection can be accepted", error=e.strerror)  # noqa: TRY400 - said
                loop.remove_reader(listener)
                loop.call_later(_ACCEPT_PAUSE, self._accept_again, listener)
                return
            sock.setblocking(False)
            self._begin(sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _begin(self, sock: socket.socket) -> None:
        """Serve a connection. It is pending at first; with too many of these the oldest is closed."""
        while len(self._pending) >= self._max_pending:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.cancel()
            self._log_drop()
        task = asyncio.create_task(self._session(sock))
        self._sessions.add(task)
        self._pending[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            self._sessions.discard(task)
            self._pending.pop(task, None)
            sock.close()  # for a task that has ended before its connection had a transport

        task.add_done_callback(ended)

    def _log_drop(self) -> None:
        self._unlogged_drops += 1
        now = asyncio.get_running_loop().time()
        if now - self._last_log >= _LOG_PAUSE:
            log.warning(
                "streaming connections without a request were closed for new ones: too many at once",
                closed=self._unlogged_drops,
                limit=self._max_pending,
            )
            self._unlogged_drops, self._last_log = 0, now

    async def _session(self, sock: socket.socket) -> None:
        try:
            await self._load()
            from criserver.streaming.session import serve

            await serve(sock, certificate=self._certificate, idle=self._idle, take=self._take)
        except Exception as e:
            log.exception("a streaming connection cannot be served", error=words_of(e))

    async def _load(self) -> None:
        """Import what serves a connection: once, and in a thread, as it takes tens of milliseconds.

        The thread is its own: those of the pool may all wait for a disk that stands still.
        """
        if self._loading is None:
            load = in_loose_thread(partial(importlib.import_module, "criserver.streaming.session"), "streaming")
            self._loading = asyncio.ensure_future(load)
        try:
            await outlive(self._loading)
        except Exception:
            self._loading = None  # the next connection tries again
            raise

    def _take(self, token: str) -> Offer | None:
        """The offer of a token, for the connection of the current task; None for a token that is not valid.

        Raises ResourceExhaustedError for too many clients. The offer is kept then: the client may come again.
        """
        if self.clients >= self._max_accepted:
            raise ResourceExhaustedError(f"{self._max_accepted} clients are being served; try again later")
        offer = self._offers.take(token)
        task = asyncio.current_task()
        if offer is not None and task is not None:
            self._pending.pop(task, None)
        return offer
