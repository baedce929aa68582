"""Connections through a SOCKS proxy of the test's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from criserver.images.lookups import Lookups
from criserver.images.socks import SocksConnector


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be the proxy (RFC 1928), then the host behind it."""
    try:
        await reader.readexactly((await reader.readexactly(2))[1])
        writer.write(b"\5\0")
        await reader.readexactly(4)
        await reader.readexactly((await reader.readexactly(1))[0] + 2)
        writer.write(b"\5\0\0\1\0\0\0\0\0\0")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    finally:
        writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def status(url: str, dial_timeout: float) -> int:
    timeout = aiohttp.ClientTimeout(30, connect=dial_timeout, sock_connect=dial_timeout)
    async with (
        aiohttp.ClientSession(connector=SocksConnector(url, Lookups())) as session,
        session.get("http://r.example/", timeout=timeout) as response,
    ):
        return response.status


@pytest.mark.parametrize("dial_timeout", [0, 30], ids=["no limit", "30 s"])
async def test_the_limit_of_a_connection(port: int, dial_timeout: float) -> None:
    """0 is no limit, as for connections without a proxy."""
    assert await status(f"socks5://127.0.0.1:{port}", dial_timeout) == 200


async def test_a_proxy_of_several_addresses_is_reached_by_the_one_that_answers(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As localhost is, for a proxy that listens at one of its two addresses."""

    def found(*_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert await status(f"socks5://proxy.example:{port}", 30) == 200
