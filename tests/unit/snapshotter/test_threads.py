"""Pools and threads on a node where pthread_create(3) fails, because there is no room for another thread."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from criserver.errors import ResourceExhaustedError
from criserver.network import namespaces
from criserver.stats import NetworkCounters
from snapshotter.threads import Threads, in_thread, start_thread


@contextmanager
def no_room() -> Iterator[None]:
    """No thread can be started."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


@pytest.fixture
def pool() -> Iterator[Threads]:
    with Threads(4) as pool:
        yield pool


def test_a_pool_goes_on_with_the_threads_that_it_has(pool: Threads) -> None:
    held, go = threading.Event(), threading.Event()
    first = pool.submit(lambda: (held.set(), go.wait(10)))
    assert held.wait(10)
    with no_room():
        second = pool.submit(lambda: 7)  # no thread is idle
    go.set()
    assert second.result(10) == 7
    assert first.done()


def test_a_pool_without_any_thread_refuses_and_does_not_make_the_call_later(pool: Threads) -> None:
    made: list[str] = []
    with no_room(), pytest.raises(OSError, match="can't start new thread; is a limit of processes reached") as caught:
        pool.submit(made.append, "refused")
    assert caught.value.errno == errno.EAGAIN
    pool.submit(made.append, "taken").result(10)
    pool.submit(made.append, "last").result(10)
    assert made == ["taken", "last"]


async def test_the_loops_own_calls_go_on_too() -> None:
    asyncio.get_running_loop().set_default_executor(Threads(4))
    assert await asyncio.to_thread(lambda: 1) == 1
    with no_room():
        found = await asyncio.gather(*(in_thread(lambda n=n: n) for n in range(20)))
    assert found == list(range(20))


def test_a_thread_of_its_own_is_refused_as_an_error_of_the_node() -> None:
    with no_room(), pytest.raises(OSError, match="can't start new thread"):
        start_thread(lambda: None, "x")


async def test_namespaces_without_a_thread_to_make_them_in_are_refused(tmp_path: Path) -> None:
    with no_room(), pytest.raises(ResourceExhaustedError, match=r"no namespaces can be made in .*/ns: can't start new"):
        await namespaces.make(f"{tmp_path}/ns", net=True, ipc=False, uts=False)
    assert not (tmp_path / "ns").exists()


async def test_network_counters_come_again_once_there_is_a_thread_to_open_them(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, path = NetworkCounters(), "/proc/self/ns/net"
    monkeypatch.setattr(
        "criserver.stats.network_counters._enter_and_open", lambda _: os.open("/proc/net/dev", os.O_RDONLY)
    )
    with no_room(), capture_logs() as logs:
        assert await networks.read([path]) == {}
    assert [line["event"] for line in logs] == ["pods' network counters cannot be opened"]
    assert path in await networks.read([path])
    networks.close()
