"""The HTTP endpoint: what it answers, and what it does not let a client do."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from criserver.errors import CriError
from criserver.telemetry import scrape_server
from criserver.telemetry.scrape_server import ScrapeServer


async def body() -> bytes:
    return b"up 1\n"


@pytest.fixture
async def server() -> AsyncIterator[ScrapeServer]:
    server = ScrapeServer("127.0.0.1:0", body, "text/plain; version=0.0.4")
    await server.start()
    yield server
    await server.stop()


async def sent(server: ScrapeServer, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port())
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_scrape(server: ScrapeServer) -> None:
    answer = await sent(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: text/plain; version=0.0.4" in head
    assert b"Connection: close" in head
    assert rest == b"up 1\n"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET / HTTP/1.1", b"404"), (b"POST /metrics HTTP/1.1", b"405"), (b"HEAD /metrics?x=1 HTTP/1.1", b"200")],
)
async def test_other_requests(server: ScrapeServer, request_line: bytes, status: bytes) -> None:
    answer = await sent(server, request_line + b"\r\nHost: x\r\n\r\n")
    assert answer.split(b" ")[1] == status
    if request_line.startswith(b"HEAD"):
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\nA: " + b"x" * 20000])
async def test_what_is_no_request_or_too_long_is_closed(server: ScrapeServer, data: bytes) -> None:
    assert await sent(server, data) == b""
    assert (await sent(server, b"GET /metrics HTTP/1.0\r\n\r\n")).endswith(b"up 1\n")


async def test_a_client_that_sends_nothing_is_closed(server: ScrapeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape_server, "_TIMEOUT", 0.01)
    assert await sent(server, b"GET /met") == b""


async def test_connections_have_a_limit(server: ScrapeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape_server, "MAX_CONNECTIONS", 1)
    reader, first = await asyncio.open_connection("127.0.0.1", server.port())
    first.write(b"GET /metrics")
    while not server._connections:
        await asyncio.sleep(0)
    assert await sent(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    first.write(b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.read()).endswith(b"up 1\n")
    first.close()


async def test_a_client_that_does_not_read_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not sent yet is in memory, so more clients must not add to it."""
    monkeypatch.setattr(scrape_server, "MAX_CONNECTIONS", 1)

    async def large() -> bytes:
        return bytes(60_000)

    server = ScrapeServer("127.0.0.1:0", large, "text/plain")
    await server.start()
    server._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    first = socket.socket()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    await asyncio.to_thread(first.connect, ("127.0.0.1", server.port()))
    first.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    while not server._connections:
        await asyncio.sleep(0)
    (serving,) = server._connections
    assert await sent(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    assert not serving.done()
    await server.stop()
    assert serving.done()
    first.close()


async def test_the_umask_of_the_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and other tasks make files meanwhile."""
    monkeypatch.setattr(os, "umask", None)
    server = ScrapeServer(f"unix://{tmp_path}/metrics.sock", body, "text/plain")
    await server.start()
    await server.stop()


async def test_a_port_that_is_none_is_named() -> None:
    with pytest.raises(CriError, match=r"metrics: cannot listen on 127\.0\.0\.1:99999"):
        await ScrapeServer("127.0.0.1:99999", body, "text/plain").start()


async def test_a_unix_socket_is_for_root_alone_and_replaces_an_old_one(tmp_path: Path) -> None:
    path = f"{tmp_path}/new/metrics.sock"
    for _ in range(2):
        server = ScrapeServer(f"unix://{path}", body, "text/plain")
        await server.start()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).endswith(b"up 1\n")
        writer.close()
        server._server.close()
    await server.stop()
    assert not os.path.exists(path)


async def test_an_address_that_is_in_use_is_named(server: ScrapeServer) -> None:
    again = ScrapeServer(f"127.0.0.1:{server.port()}", body, "text/plain")
    with pytest.raises(CriError, match=f"metrics: cannot listen on 127.0.0.1:{server.port()}"):
        await again.start()
