"""The streaming server on loopback, with commands of the tests' own: faults of clients, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib
import os
import resource
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from criserver.errors import CriError, ResourceExhaustedError
from criserver.streaming import (
    Command,
    CommandStreams,
    Forward,
    OutputCopier,
    RequestedStreams,
    ServerCertificate,
    StreamingServer,
    client_link,
    command_session,
    forward_session,
    offers,
    server,
    session,
)
from snapshotter.threads import Threads, in_loose_thread
from tests.support import spdy_peer
from tests.support.streaming_client import Refused, Spdy, WebSocket
from tests.support.waiting import until

OUTPUT = RequestedStreams(stdin=False, stdout=True, stderr=False, tty=False)
CAT = RequestedStreams(stdin=True, stdout=True, stderr=False, tty=False)
INPUT = RequestedStreams(stdin=True, stdout=False, stderr=False, tty=False)


async def say_hi(streams: CommandStreams) -> int:
    assert streams.stdout is not None
    await streams.stdout.write(b"hi")
    return 0


async def cat(streams: CommandStreams) -> int:
    assert streams.stdin is not None
    assert streams.stdout is not None
    while data := await streams.stdin.read():
        await streams.stdout.write(bytes(data))
    return 0


@pytest.fixture
async def serving() -> AsyncIterator[StreamingServer]:
    found = StreamingServer("127.0.0.1", 0, idle=60)
    await found.start()
    yield found
    await found.stop()


def hi(serving: StreamingServer) -> str:
    return serving.offer(Command(OUTPUT, say_hi))


async def blocking(work: Callable[..., Any], *args: Any) -> Any:
    """A client's work, beside the server in this test's loop."""
    return await asyncio.to_thread(work, *args)


def raw(url: str, data: bytes) -> bytes:
    """Send bytes, and return all that comes until the server closes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as sock:
        sock.sendall(data)
        found = b""
        while piece := sock.recv(65536):
            found += piece
        return found


def run_command(url: str, tls: ssl.SSLContext | None = None) -> tuple[bytes, dict[str, Any]]:
    client = Spdy(url, tls=tls).open_command("error", "stdout")
    status = client.finish()
    return bytes(client.got["stdout"]), status


async def test_an_offer_is_carried_out_once(serving: StreamingServer) -> None:
    url = hi(serving)
    assert await blocking(run_command, url) == (b"hi", {"status": "Success"})
    with pytest.raises(Refused, match="404"):
        await blocking(run_command, url)


async def test_an_offer_that_is_too_old(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "LIFETIME", 0.0)
    with pytest.raises(Refused, match="404"):
        await blocking(run_command, hi(serving))


async def test_a_forged_token_takes_no_other_offer(serving: StreamingServer) -> None:
    url = hi(serving)
    for forged in (url[:-1], url + "x", url.rpartition("/")[0] + "/", url.rpartition("/")[0] + "/../" + "A" * 22):
        with pytest.raises(Refused, match="404"):
            await blocking(run_command, forged)
    assert (await blocking(run_command, url))[0] == b"hi"


async def test_offers_that_nobody_takes_are_bounded(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "LIMIT", 3)
    first = hi(serving)
    for _ in range(2):
        hi(serving)
    with pytest.raises(ResourceExhaustedError, match="3 streaming requests"):
        hi(serving)
    await blocking(run_command, first)
    hi(serving)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET {} HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET {} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"400"),
        (b"POST {} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", b"400"),
        (b"GET {} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"400"),
        (b"GET {} HTTP/1.1\r\nX: " + b"x" * 20000, b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, b"400"),
        (b"DELETE {} HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
    ],
)
async def test_requests_that_are_no_upgrade(serving: StreamingServer, head: bytes, status: bytes) -> None:
    url = hi(serving)
    answer = await blocking(raw, url, head.replace(b"{}", urlsplit(url).path.encode()))
    assert answer.startswith(b"HTTP/1.1 " + status), answer
    assert (await blocking(run_command, url))[0] == b"hi", "the offer is still there"


async def test_a_request_that_does_not_come(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HEAD_TIMEOUT", 0.2)
    answer = await blocking(raw, hi(serving), b"GET /command")
    assert answer.startswith(b"HTTP/1.1 408")


async def test_streams_that_are_not_opened(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_session, "STREAMS_TIMEOUT", 0.2)

    def work() -> None:
        client = Spdy(hi(serving)).open_command("stdout")
        while client.read():
            pass
        assert client.got["stdout"] == b""

    await blocking(work)


async def test_half_of_a_forwarded_connection(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = client_link.STREAMS_TIMEOUT
    monkeypatch.setattr(forward_session, "STREAMS_TIMEOUT", 0.2)

    async def dial(port: int) -> socket.socket:
        raise CriError(f"nobody at {port}")

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        client.open("half", streamtype="data", port="80", requestid="1")
        while "half" not in client.reset:
            assert client.read()
        monkeypatch.setattr(forward_session, "STREAMS_TIMEOUT", usual)
        client.open("e", streamtype="error", port="81", requestid="2")
        client.open("d", streamtype="data", port="81", requestid="2")
        client.until("e", b"nobody at 81")

    await blocking(work, serving.offer(Forward((), dial)))


class Pod:
    """One port of a pod."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)

    async def dial(self, port: int) -> socket.socket:
        sock = socket.create_connection(self.listener.getsockname())
        sock.setblocking(False)
        return sock

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(30)
        return connection


@pytest.fixture
def pod() -> Iterator[Pod]:
    found = Pod()
    yield found
    found.listener.close()


def open_port(client: Spdy, number: int) -> None:
    client.open(f"error{number}", streamtype="error", port="80", requestid=str(number))
    client.open(f"data{number}", streamtype="data", port="80", requestid=str(number))


@pytest.mark.parametrize("flags", [0, spdy_peer.UNIDIRECTIONAL, spdy_peer.UNIDIRECTIONAL | spdy_peer.FIN])
async def test_a_stream_that_is_opened_and_reset_at_once(serving: StreamingServer, pod: Pod, flags: int) -> None:
    """And one on which only the client may speak. Other connections on the same one are not to notice."""

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        open_port(client, 1)
        pod.accept().sendall(b"one")
        client.until("data1", b"one")
        # A header block of another zlib stream would be none; this one has no headers, and so no block.
        opening = spdy_peer.control(spdy_peer.SYN_STREAM, struct.pack(">IIH", 5, 0, 0), flags)
        reset = spdy_peer.words(spdy_peer.RST_STREAM, 5, 5)
        client.sock.sendall(opening + (b"" if flags else reset))
        client.ids["5"], client.spdy._next_id = 5, 7
        open_port(client, 2)
        pod.accept().sendall(b"two")
        client.until("data2", b"two")

    await blocking(work, serving.offer(Forward((), pod.dial)))


async def test_a_client_that_waits_for_the_end_of_the_errors(serving: StreamingServer, pod: Pod) -> None:
    """kubectl before 1.32 closes its side only then, also when the pod has closed the connection."""

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        open_port(client, 1)
        client.send("error1", b"", end=True)
        with pod.accept() as connection:
            connection.sendall(b"all")
        while not client.ended >= {"data1", "error1"}:
            assert client.read()
        assert client.got["data1"] == b"all"

    await blocking(work, serving.offer(Forward((), pod.dial)))


async def test_a_plain_websocket_ends_with_the_last_of_its_connections(serving: StreamingServer, pod: Pod) -> None:
    """It has no other sign for that, and a client that reads to the end waits for it."""

    def work(url: str) -> None:
        client = WebSocket(url, "v4.channel.k8s.io")
        client.sock.settimeout(30)
        first, second = pod.accept(), pod.accept()
        first.close()
        second.sendall(b"still")
        while b"still" not in client.got[0] + client.got[2]:
            assert client.read()
        second.close()
        while client.read():
            pass
        assert client.closed is not None
        assert client.closed.code == 1000

    await blocking(work, serving.offer(Forward((80, 81), pod.dial)))


async def test_what_comes_for_a_connection_that_has_ended_holds_up_no_other(serving: StreamingServer, pod: Pod) -> None:
    def work(url: str) -> None:
        client = WebSocket(url, "v4.channel.k8s.io")
        client.sock.settimeout(30)
        connections = {pod.accept(), pod.accept()}
        for connection in connections:
            connection.sendall(b"here")
        client.until(0, b"here")
        client.until(2, b"here")
        # Which of them is whose is told by what arrives there.
        client.send(0, b"x")
        (first,) = select.select([*connections], [], [], 30)[0]
        (second,) = connections - {first}
        first.close()
        for _ in range(20):
            client.send(0, bytes(100_000))
        client.send(2, b"still")
        assert second.recv(5) == b"still"
        client.close()
        second.close()

    await blocking(work, serving.offer(Forward((80, 81), pod.dial)))


async def test_a_plain_websocket_for_no_port(serving: StreamingServer, pod: Pod) -> None:
    def work(url: str) -> None:
        client = WebSocket(url, "v4.channel.k8s.io")
        client.sock.settimeout(30)
        while client.read():
            pass

    await blocking(work, serving.offer(Forward((), pod.dial)))


async def test_sizes_for_no_terminal_do_not_hold_up_the_input(serving: StreamingServer) -> None:
    def work(url: str) -> None:
        client = WebSocket(url)
        client.sock.settimeout(30)
        for _ in range(20):
            client.send(4, b'{"Width":80,"Height":24}' * 1000)
        client.send(0, b"input")
        client.until(1, b"input")
        client.end(0)
        assert client.finish() == {"status": "Success"}

    await blocking(work, serving.offer(Command(CAT, cat)))


@pytest.fixture
async def stuck(serving: StreamingServer) -> AsyncIterator[str]:
    """The address of a command that takes nothing of its input."""
    gate = asyncio.Event()

    async def wait(streams: CommandStreams) -> int:
        await gate.wait()
        return 0

    yield serving.offer(Command(INPUT, wait))
    gate.set()


def memory_for(client: Spdy, pieces: Iterator[bytes]) -> int:
    """Bytes of memory that are still in use when the server has been sent all of that, or does not take it."""
    time.sleep(0.2)
    client.sock.settimeout(2)
    tracemalloc.start()
    try:
        with contextlib.suppress(TimeoutError):
            for piece in pieces:
                client.sock.sendall(piece)
        time.sleep(0.2)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def skipped(size: int) -> bytes:
    """A control frame of a type that nobody knows."""
    return spdy_peer.control(99, bytes(size))


@pytest.mark.parametrize(
    ("piece", "count", "bound"),
    [(lambda frame: frame + skipped(65_000), 300, 1 << 20), (lambda frame: frame * 5000, 40, 4 << 20)],
    ids=["between frames that are skipped", "in many small frames"],
)
async def test_input_that_nobody_takes_costs_no_more_than_its_size(
    stuck: str, piece: Callable[[bytes], bytes], count: int, bound: int
) -> None:
    def work(url: str) -> None:
        client = Spdy(url).open_command("error", "stdin")
        sent = piece(spdy_peer.data(client.ids["stdin"], b"x"))
        assert memory_for(client, (sent for _ in range(count))) < bound

    await blocking(work, stuck)


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[client_link.ClientLink]:
    """The server's connections."""
    found: list[client_link.ClientLink] = []
    made = client_link.ClientLink.connection_made
    monkeypatch.setattr(
        client_link.ClientLink, "connection_made", lambda self, t: (found.append(self), made(self, t))[1]
    )
    return found


async def test_answers_that_nobody_takes_are_bounded(stuck: str, links: list[client_link.ClientLink]) -> None:
    most = 0

    def work(url: str) -> None:
        nonlocal most
        client = Spdy(url).open_command("error", "stdin")
        client.sock.settimeout(3)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        links[0]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        # No read of the server's has more of them than it answers at once.
        pings = spdy_peer.words(spdy_peer.PING, 1) * 900 + skipped(55_000)
        with contextlib.suppress(TimeoutError):
            for _ in range(300):
                client.sock.sendall(pings)
                most = max(most, links[0]._transport.get_write_buffer_size())
        # The last that it took are answered, and it reads no more.
        most = max(most, links[0]._transport.get_write_buffer_size())

    await blocking(work, stuck)
    assert client_link.ANSWER_LIMIT < most < client_link.ANSWER_LIMIT * 1.1


async def test_output_of_many_streams_that_nobody_takes_is_bounded(
    serving: StreamingServer, pod: Pod, links: list[client_link.ClientLink]
) -> None:
    count, most = 40, 0

    def feed() -> None:
        connections = [pod.accept() for _ in range(count)]
        with contextlib.suppress(ConnectionError):
            while True:
                for connection in connections:
                    connection.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        connection.send(bytes(1 << 20))
                time.sleep(0.001)

    def work(url: str) -> None:
        nonlocal most
        client = Spdy(url, "portforward.k8s.io")
        feeder = threading.Thread(target=feed)
        feeder.start()
        for number in range(count):
            open_port(client, number)
        # At first until it is full, however long that takes, and then for a while.
        reads, deadline = 0, time.monotonic() + 30
        while reads < 300 and time.monotonic() < deadline:
            client.sock.recv(65536)
            time.sleep(0.005)
            most = max(most, links[0]._transport.get_write_buffer_size())
            reads += most > client_link.WRITE_LIMIT
        client.close()
        feeder.join()

    await blocking(work, serving.offer(Forward((), pod.dial)))
    assert client_link.WRITE_LIMIT < most < 2 * client_link.WRITE_LIMIT


async def test_no_more_is_read_than_a_client_has_a_window_for(
    serving: StreamingServer, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may open hundreds of streams, and grant a byte on each."""
    copiers: list[OutputCopier] = []
    run = OutputCopier.run
    monkeypatch.setattr(OutputCopier, "run", lambda copier: (copiers.append(copier), run(copier))[1])

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        client.sock.sendall(spdy_peer.control(spdy_peer.SETTINGS, struct.pack(">III", 1, 7, 10)))
        open_port(client, 1)
        with pod.accept() as connection:
            connection.sendall(b"x" * 100_000)
            # The client's own code would grant more.
            answer = b""
            for count, granted in ((10, 0), (5, 5)):
                if granted:
                    client.sock.sendall(spdy_peer.words(spdy_peer.WINDOW_UPDATE, client.ids["data1"], granted))
                while not answer.endswith(b"\0" + bytes([count]) + b"x" * count):
                    answer += client.sock.recv(65536)
            (copier,) = copiers
            assert copier.copied == 15
        client.close()

    await blocking(work, serving.offer(Forward((), pod.dial)))


async def test_a_client_that_goes_is_sent_no_more(
    serving: StreamingServer, pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio complains of each send after the first few that came too late."""

    def feed(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), connection:
            while True:
                connection.sendall(bytes(100_000))

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        feeders = []
        for number in range(20):
            open_port(client, number)
            feeders.append(threading.Thread(target=feed, args=(pod.accept(),)))
            feeders[-1].start()
        for _ in range(20):
            assert client.read()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        for feeder in feeders:
            feeder.join()

    await blocking(work, serving.offer(Forward((), pod.dial)))
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_a_command_that_is_slower_than_its_client_costs_one_timer(serving: StreamingServer) -> None:
    async def slow(streams: CommandStreams) -> int:
        assert streams.stdin is not None
        while await streams.stdin.read():
            await asyncio.sleep(0.0005)
        return 0

    def work(url: str) -> None:
        client = Spdy(url).open_command("error", "stdin")
        for _ in range(1000):
            client.send("stdin", bytes(64 << 10))
        client.send("stdin", b"", end=True)
        client.finish()

    await blocking(work, serving.offer(Command(INPUT, slow)))
    assert len(asyncio.get_running_loop()._scheduled) < 10  # type: ignore[attr-defined]


async def test_a_client_that_goes_leaves_no_complaint(serving: StreamingServer) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    begun = asyncio.Event()

    async def both(streams: CommandStreams) -> int:
        async with asyncio.TaskGroup() as group:
            group.create_task(cat(streams))
            begun.set()
            await asyncio.sleep(60)
        return 0

    client = await blocking(
        lambda url: Spdy(url).open_command("error", "stdin", "stdout"), serving.offer(Command(CAT, both))
    )
    await begun.wait()
    client.close()
    await until(lambda: not serving._sessions)
    gc.collect()
    assert complaints == []


def flood(begun: asyncio.Event) -> Callable[[CommandStreams], Awaitable[int]]:
    """A command that never ends to write."""

    async def run(streams: CommandStreams) -> int:
        assert streams.stdout is not None
        begun.set()
        while True:
            await streams.stdout.write(b"x" * 65536)

    return run


async def test_a_connection_on_which_nothing_moves() -> None:
    """Its client is told: it would take the end of the connection for the command's success."""
    found = StreamingServer("127.0.0.1", 0, idle=0.3)
    await found.start()
    begun, gone = asyncio.Event(), asyncio.Event()

    async def wait(streams: CommandStreams) -> int:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            gone.set()
        return 0

    def work(url: str) -> dict[str, Any]:
        with contextlib.suppress(Refused, ConnectionError):  # a client that is slow is idle before its command begins
            return Spdy(url).open_command("error", "stdout").finish()
        return {}

    status: dict[str, Any] = {}
    while not begun.is_set():
        status = await blocking(work, found.offer(Command(OUTPUT, wait)))
    await asyncio.wait_for(gone.wait(), 10)
    assert status["status"] == "Failure"
    assert "nothing moved on its connection" in status["message"]
    await until(lambda: not found._sessions)
    await found.stop()


async def test_a_client_that_takes_nothing_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "END_TIMEOUT", 0.05)
    monkeypatch.setattr(command_session, "END_TIMEOUT", 0.05)
    found = StreamingServer("127.0.0.1", 0, idle=1)
    await found.start()
    begun = asyncio.Event()
    client = await blocking(
        lambda url: Spdy(url).open_command("error", "stdout"), found.offer(Command(OUTPUT, flood(begun)))
    )
    await begun.wait()
    await until(lambda: not found._sessions)
    client.close()
    await found.stop()


@contextlib.contextmanager
def idle(url: str, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that send no request."""
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20)))
            made[-1].sendall(data)
        yield made


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("data", [b"", b"GET /command HTTP/1.1\r\nX-Slow: 1"])
async def test_a_newcomer_takes_the_place_of_the_oldest_that_has_not_said_what_it_wants(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(serving, "_max_pending", 3)
    begun, end = asyncio.Event(), asyncio.Event()

    async def wait(streams: CommandStreams) -> int:
        begun.set()
        await end.wait()
        return 0

    # The oldest of all, and known: it stays.
    known = await blocking(lambda url: Spdy(url).open_command("error", "stdout"), serving.offer(Command(OUTPUT, wait)))
    await begun.wait()
    url = hi(serving)
    with idle(url, 3, data) as others:
        await until(lambda: len(serving._pending) >= 3)
        assert (await blocking(run_command, url))[0] == b"hi"
        await until(lambda: is_closed(others[0]))
        assert [is_closed(sock) for sock in others] == [True, False, False]
    end.set()
    assert await blocking(known.finish) == {"status": "Success"}


async def test_a_thousand_idle_connections_keep_nobody_out(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    monkeypatch.setattr(session, "HEAD_TIMEOUT", 300.0)  # it is not what makes room
    try:
        tracemalloc.start()
        with contextlib.ExitStack() as others:
            for _ in range(4):
                others.enter_context(idle(hi(serving), 300))
                assert (await blocking(run_command, hi(serving)))[0] == b"hi"
                assert len(serving._sessions) <= serving._max_pending + 1
            kept, _ = tracemalloc.get_traced_memory()
            assert kept < serving._max_pending * (32 << 10)
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connections_that_begin_no_tls_make_room_too(
    certificate: tuple[str, str], trusted: ssl.SSLContext
) -> None:
    found = StreamingServer("127.0.0.1", 0, certificate=ServerCertificate(*certificate), idle=60)
    await found.start()
    found._max_pending = 5
    with idle(hi(found), 20):
        await until(lambda: len(found._pending) >= 5)
        assert await blocking(run_command, hi(found), trusted) == (b"hi", {"status": "Success"})
        assert len(found._sessions) <= 6
    await found.stop()


async def test_clients_are_bounded_and_told(serving: StreamingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_max_accepted", 1)
    begun, end = asyncio.Event(), asyncio.Event()

    async def wait(streams: CommandStreams) -> int:
        begun.set()
        await end.wait()
        return 0

    known = await blocking(lambda url: Spdy(url).open_command("error", "stdout"), serving.offer(Command(OUTPUT, wait)))
    await begun.wait()
    url = hi(serving)
    with pytest.raises(Refused, match="503"):
        await blocking(run_command, url)
    end.set()
    await blocking(known.finish)
    await until(lambda: not serving._sessions)
    assert (await blocking(run_command, url))[0] == b"hi", "the offer is still there"


async def test_a_connection_that_cannot_be_served_is_closed_and_the_next_is_served(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: str) -> ModuleType:
        raise OSError(errno.EMFILE, "Too many open files")

    url = hi(serving)
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", failing)
        with capture_logs() as logs:
            assert await blocking(raw, url, b"") == b""
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("error", "a streaming connection cannot be served")
    ]
    assert (await blocking(run_command, url))[0] == b"hi"


async def test_a_client_is_served_while_all_threads_wait_for_a_disk(serving: StreamingServer) -> None:
    loop, going_on = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(Threads(1))
    standing = loop.run_in_executor(None, going_on.wait, 60)
    url = hi(serving)
    try:
        outcome = await asyncio.wait_for(in_loose_thread(lambda: run_command(url), "client"), 30)
        assert outcome[0] == b"hi"
    finally:
        going_on.set()
        await standing


async def test_no_descriptor_left_is_no_end_of_listening(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ACCEPT_PAUSE", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    url = hi(serving)
    parts = urlsplit(url)
    with socket.socket() as sock:
        sock.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
        try:
            with contextlib.suppress(BlockingIOError):
                sock.connect((parts.hostname, parts.port))
            await asyncio.sleep(0.2)  # without a descriptor it is not accepted
            assert not serving._sessions
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: serving._sessions)
    assert (await blocking(run_command, url))[0] == b"hi"


@pytest.mark.parametrize("connect", [lambda url: Spdy(url).open_command("error", "stdout"), WebSocket])
async def test_a_stop_ends_what_is_under_way_and_says_so(
    serving: StreamingServer, connect: Callable[[str], Spdy | WebSocket]
) -> None:
    """Over SPDY, kubectl and crictl take a connection that ends without a status for a success."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait(streams: CommandStreams) -> int:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return 0

    client = await blocking(connect, serving.offer(Command(OUTPUT, wait)))
    await begun.wait()
    stopping = asyncio.create_task(serving.stop())
    status = await blocking(client.finish)
    await stopping
    assert ended.is_set()
    assert status["status"] == "Failure"
    assert "the daemon is being stopped" in status["message"]


async def test_a_client_that_takes_nothing_does_not_keep_the_server_from_stopping(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "END_TIMEOUT", 0.05)
    monkeypatch.setattr(command_session, "END_TIMEOUT", 0.05)
    begun = asyncio.Event()
    client = await blocking(
        lambda url: Spdy(url).open_command("error", "stdout"), serving.offer(Command(OUTPUT, flood(begun)))
    )
    await begun.wait()
    await serving.stop()
    assert not serving._sessions
    client.close()


async def test_an_error_of_a_command_is_told_and_so_is_one_of_ours(serving: StreamingServer) -> None:
    """Over SPDY, kubectl takes an end without a status for a success."""

    async def refuse(streams: CommandStreams) -> int:
        raise CriError("it cannot be done")

    async def crash(streams: CommandStreams) -> int:
        raise RuntimeError("a bug")

    async def run_out(streams: CommandStreams) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def quote(streams: CommandStreams) -> int:
        raise CriError("it says \ud800\x1b" + "x" * 100_000)

    _, status = await blocking(run_command, serving.offer(Command(OUTPUT, quote)))
    assert status["message"].startswith("Internal error occurred: it says \\ud800\\x1bxxx")
    assert len(status["message"]) < 4200
    _, status = await blocking(run_command, serving.offer(Command(OUTPUT, refuse)))
    assert status["message"] == "Internal error occurred: it cannot be done"
    _, status = await blocking(run_command, serving.offer(Command(OUTPUT, crash)))
    assert status["message"] == "Internal error occurred: RuntimeError: a bug"
    _, status = await blocking(run_command, serving.offer(Command(OUTPUT, run_out)))
    assert status["message"] == "Internal error occurred: OSError: Too many open files"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = f"{directory}/cert.pem", f"{directory}/key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def trusted(certificate: tuple[str, str]) -> ssl.SSLContext:
    """Of a client that trusts the server."""
    return ssl.create_default_context(cafile=certificate[0])


@pytest.mark.parametrize("client_of", [Spdy, WebSocket])
async def test_over_tls(
    certificate: tuple[str, str],
    trusted: ssl.SSLContext,
    client_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[str] = []
    monkeypatch.setattr(session.log, "exception", lambda words, **_: failures.append(words), raising=False)
    found = StreamingServer("127.0.0.1", 0, certificate=ServerCertificate(*certificate), idle=60)
    await found.start()
    piece = os.urandom(1_000_000)

    def work(url: str) -> None:
        assert url.startswith("https://")
        client = client_of(url, tls=trusted)
        if isinstance(client, Spdy):
            client.open_command("error", "stdin", "stdout")
            client.send("stdin", piece, end=True)
            assert client.finish() == {"status": "Success"}
            assert client.got["stdout"] == piece
        else:
            client.send(0, piece)
            client.end(0)
            assert client.finish() == {"status": "Success"}
            assert client.got[1] == piece

    await blocking(work, found.offer(Command(CAT, cat)))
    await until(lambda: not found._sessions)
    assert failures == []
    await found.stop()


async def test_an_address_that_is_taken(serving: StreamingServer) -> None:
    port = urlsplit(hi(serving)).port
    assert port is not None
    with pytest.raises(CriError, match=f"cannot listen on 127.0.0.1:{port}"):
        await StreamingServer("127.0.0.1", port, idle=60).start()


@pytest.mark.parametrize(("host", "base"), [("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
async def test_the_address_that_is_given_out(host: str, base: str) -> None:
    found = StreamingServer(host, 0, idle=60)
    await found.start()
    assert hi(found).startswith(base)
    await found.stop()


async def test_a_client_that_closes_when_it_has_heard_the_end(
    serving: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kubectl does; the server may find the connection closed before it closes it itself."""
    failures: list[str] = []
    monkeypatch.setattr(session.log, "exception", lambda words, **_: failures.append(words), raising=False)

    def work(url: str) -> None:
        client = Spdy(url).open_command("error", "stdout")
        client.until("error", b"Success")
        client.close()

    for _ in range(50):
        await blocking(work, hi(serving))
    assert failures == []


async def test_a_forwarded_connection_that_fails_is_told_to_the_log_and_the_next_is_served(
    serving: StreamingServer, pod: Pod
) -> None:
    """By an error that nobody thought of: asyncio would tell of it when the task is collected."""

    async def dial(port: int) -> socket.socket:
        if port == 81:
            raise RuntimeError("unthought of")
        return await pod.dial(port)

    def work(url: str) -> None:
        client = Spdy(url, "portforward.k8s.io")
        client.open("e", streamtype="error", port="81", requestid="1")
        client.open("d", streamtype="data", port="81", requestid="1")
        while "d" not in client.reset:
            assert client.read()
        open_port(client, 2)
        with pod.accept() as connection:
            connection.sendall(b"hello")
            client.until("data2", b"hello")

    with capture_logs() as logs:
        await blocking(work, serving.offer(Forward((), dial)))
    (line,) = (line for line in logs if line["log_level"] == "error")
    assert (line["event"], line["port"], line["error"]) == ("a forwarded connection failed", 81, "unthought of")
