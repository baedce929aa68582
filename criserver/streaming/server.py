"""The streaming server: a client comes with the address that CRI's Exec, Attach or PortForward has given out.

Kubernetes' clients reach it through the kubelet, crictl directly; each request is upgraded to SPDY/3.1 or to a
WebSocket. What is done with the streams is the offer's: this room knows no containers.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from criserver.errors import CriError
from criserver.streaming import handshake, pipes, portforward, remotecommand, websocket
from criserver.streaming.handshake import Handshake, Kind, Request
from criserver.streaming.link import READ_SIZE, Link
from criserver.streaming.offers import Offers
from criserver.streaming.remotecommand import Features, Size, Wanted
from criserver.streaming.spdy.headers import Pairs
from criserver.streaming.streams import ChannelCarrier, SpdyCarrier, Stream
from criserver.text import status

log = structlog.get_logger(__name__)

# Seconds: for the request's head, and for all streams of a command, or both of a forwarded connection, to be opened.
HEAD_TIMEOUT = 10.0
STREAMS_TIMEOUT = 30.0
# Connections at once of clients that have come with an address of ours, each with a few MiB at the worst of what its
# client has sent, and of what it does not take.
MAX_CONNECTIONS = 1000
# And of all others, who have not said yet what they want, or have no such address. The kubelet and any process of the
# node come from one peer, 127.0.0.1, so no count by peer tells them apart: the oldest makes room for the newest.
# Whoever is waited for sends its request at once, and is known before so many others can come.
MAX_STRANGERS = 512
# The parts of all descriptors that these may take: a known client has about a dozen. The rest is the daemon's, whose
# own socket has to go on.
_SHARE_OF_KNOWN, _SHARE_OF_STRANGERS = 32, 8
_BACKLOG = 1024
# Connections that are accepted in one turn of the loop.
_ACCEPTS = 16
# Seconds: until it is tried again where no descriptor or memory is left, and between words of the log on one matter.
_ACCEPT_PAUSE = 1.0
_LOG_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Streams:
    """A client's side of a command: None for what was not asked for."""

    stdin: Stream | None
    stdout: Stream | None
    stderr: Stream | None
    resize: Stream | None

    async def sizes(self) -> AsyncIterator[Size]:
        """The sizes that the client's terminal takes."""
        if self.resize is None:
            return
        decoder = remotecommand.Resizes()
        while data := await self.resize.read():
            if (size := decoder.feed(bytes(data))) is not None:
                yield size


@dataclass(frozen=True, slots=True)
class Command:
    """Exec or attach: ``run`` returns the exit code, and raises CriError where there is none to tell."""

    wanted: Wanted
    run: Callable[[Streams], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Forward:
    """Port forwarding: ``dial`` returns a connected socket that does not block, for a port of the pod."""

    ports: Sequence[int]
    dial: Callable[[int], Awaitable[socket.socket]]


Offer = Command | Forward


class StreamingServer:
    """Serves on one TCP address; :meth:`offer` gives out what can be asked of it.

    ``idle`` is the seconds after which a connection on which nothing moves is closed.
    """

    def __init__(self, host: str, port: int, *, tls: ssl.SSLContext | None = None, idle: float) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._idle = idle
        self._offers: Offers[Offer] = Offers()
        self._listeners: list[socket.socket] = []
        self._sessions: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}  # a part of the sessions, the oldest first
        self._most_known = MAX_CONNECTIONS
        self._most_strangers = MAX_STRANGERS
        # A view, since asyncio's TLS fills slices of it.
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._dropped = 0  # strangers, that the log was not told of
        self._told = -_LOG_PAUSE
        self._base = ""

    async def start(self) -> None:
        """Listen. Raises CriError where the address is taken or not this node's."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors != resource.RLIM_INFINITY:
            self._most_known = min(MAX_CONNECTIONS, descriptors // _SHARE_OF_KNOWN)
            self._most_strangers = min(MAX_STRANGERS, descriptors // _SHARE_OF_STRANGERS)
        try:
            await self._listen()
        except OSError as e:
            self._unlisten()
            raise CriError(f"streaming: cannot listen on {self._host}:{self._port}: {e.strerror or e}") from e
        host, port = self._listeners[0].getsockname()[:2]
        # The kubelet is on this node: an address that means all of them means the loopback one to it.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not listened on
        scheme = "http" if self._tls is None else "https"
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
        """Listen no more, and end what is under way."""
        self._unlisten()
        for session in self._sessions:
            session.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)

    def offer(self, offer: Offer) -> str:
        """The URL at which one client may take the offer, once. Raises ResourceExhaustedError."""
        kind = "command" if isinstance(offer, Command) else "portforward"
        return f"{self._base}/{kind}/{self._offers.add(offer)}"

    def _accept(self, listener: socket.socket) -> None:
        """Take who has come. Not asyncio's own server: over TLS that tells of a client only after its handshake."""
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
        """Serve a connection: one of a stranger so far, for whom the oldest of them may have to go."""
        while len(self._strangers) >= self._most_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
            self._tell_of_drop()
        task = asyncio.create_task(self._session(sock))
        self._sessions.add(task)
        self._strangers[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            self._sessions.discard(task)
            self._strangers.pop(task, None)
            sock.close()  # where it was ended before it could begin

        task.add_done_callback(ended)

    def _tell_of_drop(self) -> None:
        self._dropped += 1
        now = asyncio.get_running_loop().time()
        if now - self._told >= _LOG_PAUSE:
            log.warning(
                "streaming connections without a request were closed for new ones: too many at once",
                closed=self._dropped,
                limit=self._most_strangers,
            )
            self._dropped, self._told = 0, now

    async def _session(self, sock: socket.socket) -> None:
        """A connection's life: one request, what it asks for, and a clean end."""
        link = Link(self._buffer)
        arrival = _Arrival(link)
        watch = asyncio.create_task(self._watch(link))
        try:
            if await self._connected(sock, link):
                await self._serve(link, arrival)
                await link.finish()
        except ConnectionError:
            pass  # the client is gone
        except Exception as e:
            log.exception("a streaming session failed", error=str(e))
        finally:
            watch.cancel()
            link.abort()

    async def _connected(self, sock: socket.socket, link: Link) -> bool:
        """Whether the link has become the socket's, over TLS with a handshake that went well and was made in time."""
        limit = None if self._tls is None else HEAD_TIMEOUT
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: link, sock, ssl=self._tls, ssl_handshake_timeout=limit
            )
        except OSError:
            return False
        return True

    async def _watch(self, link: Link) -> None:
        """Close a connection on which nothing has moved for too long."""
        loop = asyncio.get_running_loop()
        while (left := link.used + self._idle - loop.time()) > 0:
            await asyncio.sleep(left)
        log.info("a streaming connection was idle for too long", seconds=self._idle)
        link.abort()

    async def _serve(self, link: Link, arrival: _Arrival) -> None:
        shake = arrival.shake
        request = await arrival.request()
        if request is None:
            return
        if len(self._sessions) - len(self._strangers) >= self._most_known:
            # Before its address is used up: it may come again.
            link.send(shake.refuse(503, f"{self._most_known} clients are being served; try again later"))
            return
        offer = self._offers.take(request.path.rpartition("/")[2])
        if offer is None:
            link.send(shake.refuse(404, "there is no such address any more: it works once, and not for long"))
            return
        task = asyncio.current_task()
        assert task is not None
        self._strangers.pop(task, None)
        protocols = _protocols(offer, request.kind)
        protocol = remotecommand.negotiate(request.protocols, protocols)
        if protocol is None:
            link.send(shake.refuse_protocols(protocols))
            return
        link.send(shake.accept(protocol))
        session = _Session(link, request.kind, protocol, shake.rest)
        await (session.command(offer) if isinstance(offer, Command) else session.forward(offer))


def _protocols(offer: Offer, kind: Kind) -> Sequence[str]:
    if isinstance(offer, Command):
        return tuple(remotecommand.SPDY_PROTOCOLS if kind is Kind.SPDY else remotecommand.WEBSOCKET_PROTOCOLS)
    return portforward.SPDY_PROTOCOLS if kind is Kind.SPDY else portforward.WEBSOCKET_PROTOCOLS


class _Arrival:
    """A client's request, from its first byte on."""

    def __init__(self, link: Link) -> None:
        self.shake = Handshake()
        self._link = link
        self._answer: asyncio.Future[Request | handshake.Refusal] = asyncio.get_running_loop().create_future()
        link.received = self._received

    def _received(self, data: bytes) -> None:
        found = self.shake.receive(data)
        if found is not None and not self._answer.done():
            self._answer.set_result(found)
            self._link.hold(self.shake)  # until somebody takes what comes behind

    async def request(self) -> Request | None:
        """The request; None where it was refused, or did not come in time. Raises ConnectionError."""
        link, answer = self._link, self._answer
        either: set[asyncio.Future[Any]] = {answer, link.lost}
        await asyncio.wait(either, timeout=HEAD_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if link.lost.done():
            raise ConnectionResetError("the client is gone")
        link.release(self.shake)
        if not answer.done():
            link.send(self.shake.refuse(408, f"the request did not come within {HEAD_TIMEOUT:g} s"))
            return None
        found = answer.result()
        if isinstance(found, handshake.Refusal):
            link.send(found.response)
            return None
        return found


class _Session:
    """What one client does with the streams of its connection."""

    def __init__(self, link: Link, kind: Kind, protocol: str, rest: bytes) -> None:
        self._link = link
        self._kind = kind
        self._protocol = protocol
        self._rest = rest

    async def command(self, offer: Command) -> None:
        """Run a command on the client's streams and tell it how that ended."""
        carrier: SpdyCarrier | ChannelCarrier
        if self._kind is Kind.SPDY:
            features = remotecommand.SPDY_PROTOCOLS[self._protocol]
            carrier, streams = await self._spdy_streams(offer.wanted, features)
        else:
            features = remotecommand.WEBSOCKET_PROTOCOLS[self._protocol]
            readable, writable = offer.wanted.websocket_channels()
            carrier = ChannelCarrier(self._link, self._protocol, readable=readable, writable=writable)
            streams = {remotecommand.Stream(number): stream for number, stream in carrier.streams.items()}
            carrier.receive(self._rest)
            await streams[offer.wanted.greeting_channel()].write(b"")
        message = await self._while_connected(_outcome(offer, streams, features))
        if message:
            await streams[remotecommand.Stream.ERROR].write(message)
        for stream in streams.values():
            stream.close()
        carrier.close()

    async def _spdy_streams(
        self, wanted: Wanted, features: Features
    ) -> tuple[SpdyCarrier, dict[remotecommand.Stream, Stream]]:
        """The streams of a command, when the client has opened them all. Raises ConnectionError where it does not."""
        expected = wanted.spdy_streams(features)
        found: dict[remotecommand.Stream, Stream] = {}
        complete = asyncio.Event()

        def opened(stream: Stream, headers: Pairs) -> None:
            try:
                kind = remotecommand.stream_of(headers)
            except CriError as e:
                raise ValueError(str(e)) from e
            if kind in found or kind not in expected:
                raise ValueError(f"a {kind.type} stream is not expected")
            found[kind] = stream
            if found.keys() == expected:
                complete.set()

        carrier = SpdyCarrier(self._link, opened)
        carrier.receive(self._rest)
        try:
            async with asyncio.timeout(STREAMS_TIMEOUT):
                await self._while_connected(complete.wait())
        except TimeoutError:
            missing = ", ".join(kind.type for kind in expected - found.keys())
            raise ConnectionAbortedError(f"the client did not open its streams: {missing}") from None
        return carrier, found

    async def forward(self, offer: Forward) -> None:
        """Serve forwarded connections until the client goes, or none can come any more."""
        tasks: set[asyncio.Task[None]] = set()

        def carry(port: int, data: Stream, error: Stream, greeting: bytes = b"") -> None:
            task = asyncio.create_task(_forwarded(offer, port, data, error, greeting))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        try:
            if self._kind is Kind.SPDY or self._protocol == websocket.TUNNEL_PROTOCOL:
                self._forward_streams(carry)
                await asyncio.wait({self._link.lost})
            else:
                carrier = self._forward_channels(offer, carry)
                if tasks:
                    await self._while_connected(asyncio.wait(tasks))
                carrier.close()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _forward_streams(self, carry: Callable[[int, Stream, Stream], None]) -> None:
        """Two streams that the client opens are a connection."""
        pairs = portforward.Pairs()
        waiting: dict[int, Stream] = {}
        timers: dict[str, asyncio.TimerHandle] = {}
        loop = asyncio.get_running_loop()

        def opened(stream: Stream, headers: Pairs) -> None:
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

        def expire(pair: portforward.Pair) -> None:
            del timers[pair.key]
            if pairs.expire(pair):
                for number in (pair.data, pair.error):
                    if number is not None:
                        waiting.pop(number).reset()

        tunnel = websocket.Tunnel() if self._kind is Kind.WEBSOCKET else None
        SpdyCarrier(self._link, opened, tunnel)
        self._link.received(self._rest)

    def _forward_channels(self, offer: Forward, carry: Callable[[int, Stream, Stream, bytes], None]) -> ChannelCarrier:
        """Two channels of the WebSocket are a connection to each of the request's ports."""
        readable, writable = portforward.websocket_channels(offer.ports)
        carrier = ChannelCarrier(self._link, self._protocol, readable=readable, writable=writable)
        carrier.receive(self._rest)
        for number, port in enumerate(offer.ports):
            carry(port, carrier.streams[2 * number], carrier.streams[2 * number + 1], portforward.greeting(port))
        return carrier

    async def _while_connected(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of work that is cancelled when the client goes; ConnectionResetError then."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._link.lost}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ConnectionResetError("the client is gone")
        finally:
            if not task.done():
                task.cancel()
                # Not wait: what a task that is cut off raises is to be taken, or asyncio complains of it.
                await asyncio.gather(task, return_exceptions=True)


async def _outcome(offer: Command, streams: dict[remotecommand.Stream, Stream], features: Features) -> bytes:
    """Run the command; what the error stream is to say of its end."""
    kind = remotecommand.Stream
    given = Streams(*(streams.get(k) for k in (kind.STDIN, kind.STDOUT, kind.STDERR, kind.RESIZE)))
    try:
        return remotecommand.exit_message(await offer.run(given), features)
    except CriError as e:
        log.info("a streamed command failed", error=str(e))
        return remotecommand.failure_message(status(str(e)), features)


async def _forwarded(offer: Forward, port: int, data: Stream, error: Stream, greeting: bytes) -> None:
    """Carry one connection between a client and a port of the pod.

    A ``greeting`` goes first on both streams, of a client that has no sign for the end of one but that of all.
    """
    try:
        if greeting:
            await data.write(greeting)
            await error.write(greeting)
        try:
            sock = await offer.dial(port)
        except CriError as e:
            log.info("a port cannot be forwarded", port=port, error=str(e))
            await error.write(status(str(e)).encode())
            return
        with sock:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(_send_all(data, sock))
                await pipes.Outflow(sock.fileno(), data).run()
                data.close()
                # Kubernetes' clients before 1.30 say that they have nothing more to send only when this has ended.
                error.close()
                if greeting:
                    sending.cancel()
    except* ConnectionError:
        pass  # the client is gone, or has let go of the stream
    except* Exception as e:
        log.exception("a forwarded connection failed", port=port, error=str(e.exceptions[0]))
    finally:
        for stream in (error, data):
            stream.close()
            stream.reset()


async def _send_all(data: Stream, sock: socket.socket) -> None:
    await pipes.copy_in(data, sock.fileno())
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is closed already
