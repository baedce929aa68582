"""Lookups while the DNS servers do not answer."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs
from yarl import URL

from criserver.errors import UnavailableError
from criserver.images import lookups as lookups_module
from criserver.images.hosts import RegistryHost
from criserver.images.lookups import Lookups
from criserver.images.socks import SocksConnector
from criserver.images.transport import NotConnectedError, Transport
from tests.support.waiting import cancelled, until

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))]


class DeadServers:
    """getaddrinfo(3) does not return before ``answer``. ``asked`` are the hosts that it was called for."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.asked: list[str] = []
        self.fails = False

    def getaddrinfo(self, host: str, *_: Any) -> list[Any]:
        self.asked.append(host)
        assert self.answer.wait(30)
        if self.fails:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return FOUND


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadServers]:
    servers = DeadServers()
    monkeypatch.setattr(socket, "getaddrinfo", servers.getaddrinfo)
    yield servers
    servers.answer.set()


async def request(lookups: Lookups, host: str) -> None:
    async with Transport(lookups) as transport:
        at = RegistryHost(f"http://{host}:1")
        async with transport.send(at, URL(at.url), (), "it", identified=False, idle=30):
            pass


async def socks_request(lookups: Lookups, host: str) -> None:
    async with (
        aiohttp.ClientSession(connector=SocksConnector(f"socks5://{host}:1", lookups)) as session,
        session.get("http://r.example/"),
    ):
        pass


async def test_lookups_that_hang_for_ever_hold_up_no_others(dead: DeadServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups_module, "_LOOKUPS", 2)
    monkeypatch.setattr(lookups_module, "_PATIENCE", 0.05)
    lookups = Lookups()
    hosts = [f"r{n}.example" for n in range(3)]
    calls = [asyncio.create_task(lookups.addresses(host, 1)) for host in hosts]
    await until(lambda: sorted(dead.asked) == hosts)
    again = asyncio.create_task(lookups.addresses(hosts[0], 1))
    await until(lambda: dead.asked.count(hosts[0]) == 2)  # another lookup, as the first one hangs
    dead.answer.set()
    assert await asyncio.gather(*calls, again) == [FOUND] * 4


@pytest.mark.parametrize("send", [request, socks_request], ids=["hosts", "proxies"])
async def test_lookups_hold_no_thread_that_other_work_needs(dead: DeadServers, send: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        lookups = Lookups()
        hosts = [f"r{n}.example" for n in range(3)]
        calls = [asyncio.create_task(send(lookups, host)) for host in hosts]
        await until(lambda: sorted(dead.asked) == hosts)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 10) == 7
        dead.answer.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(e, NotConnectedError | aiohttp.ClientProxyConnectionError) for e in outcomes)


async def test_the_same_question_is_asked_once(dead: DeadServers) -> None:
    lookups = Lookups()
    calls = [asyncio.create_task(lookups.addresses("r.example", 443)) for _ in range(2)]
    await until(lambda: dead.asked)
    dead.answer.set()
    assert await asyncio.gather(*calls) == [FOUND, FOUND]
    assert dead.asked == ["r.example"]
    await lookups.addresses("r.example", 443)
    assert dead.asked == ["r.example"] * 2  # an answer is not kept


async def test_a_few_lookups_at_a_time(dead: DeadServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("criserver.images.lookups._LOOKUPS", 2)
    lookups = Lookups()
    calls = [asyncio.create_task(lookups.addresses(f"r{n}.example", 443)) for n in range(5)]
    await until(lambda: len(dead.asked) == 2)
    await asyncio.sleep(0.05)
    assert len(dead.asked) == 2
    dead.answer.set()
    assert await asyncio.gather(*calls) == [FOUND] * 5


async def test_a_lookup_that_fails_after_its_callers_had_gone(dead: DeadServers) -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    lookups, dead.fails = Lookups(), True
    with capture_logs() as logs:
        await cancelled(lookups.addresses("r.example", 443))
        dead.answer.set()
        await until(lambda: logs)
        await asyncio.sleep(0)
        gc.collect()
    assert [line["event"] for line in logs] == ["work failed after its caller had gone"]
    assert complaints == []


async def test_a_name_that_cannot_be_resolved(dead: DeadServers) -> None:
    dead.fails = True
    dead.answer.set()
    with pytest.raises(UnavailableError, match="cannot connect: Temporary failure in name resolution"):
        await request(Lookups(), "r.example")
