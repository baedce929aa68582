"""The daemon's background tasks, and what happens if one fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from criserver import upkeep
from criserver.api.grpc_server import ended, listen
from criserver.errors import CriError
from criserver.runtime import service_manager
from criserver.stats import DiskMeter
from criserver.store import Change, Store
from criserver.upkeep import Task
from tests.support.waiting import until

FAILED = "a task failed; it is started again"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_PAUSE", 0.05)


@contextlib.asynccontextmanager
async def kept(*tasks: Task) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    keeping = asyncio.create_task(upkeep.keep(tasks, stop))
    try:
        yield keeping
    finally:
        stop.set()
        if not keeping.done():
            await keeping


class Failing:
    """Work that fails so many times, and then goes on; ``at`` is when it was started."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.at: list[float] = []

    async def run(self) -> None:
        self.at.append(asyncio.get_running_loop().time())
        if self.left:
            self.left -= 1
            raise RuntimeError("can't start new thread")
        await asyncio.Event().wait()


async def test_a_task_that_fails_is_started_again_and_the_log_has_why() -> None:
    work = Failing(1)
    with capture_logs() as logs:
        async with kept(Task("cleaning", work.run)):
            await until(lambda: len(work.at) == 2)
    (line,) = logs
    assert (line["event"], line["task"], line["error"]) == (FAILED, "cleaning", "can't start new thread")
    assert (line["log_level"], line["exc_info"]) == ("error", True)


async def test_the_pause_grows_to_its_bound() -> None:
    work = Failing(6)
    with capture_logs() as logs:
        async with kept(Task("cleaning", work.run, max_pause=0.25)):
            await until(lambda: len(work.at) == 7)
    assert [line["pause"] for line in logs] == [0.05, 0.1, 0.2, 0.25, 0.25, 0.25]
    assert all(b - a >= line["pause"] for a, b, line in zip(work.at, work.at[1:], logs, strict=False))


async def test_the_pause_is_short_again_after_a_time_that_went_well() -> None:
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times == 4:
            await asyncio.sleep(0.3)
        raise OSError("no")

    with capture_logs() as logs:
        async with kept(Task("cleaning", work, max_pause=0.25)):
            await until(lambda: times == 5)
    assert [line["pause"] for line in logs] == [0.05, 0.1, 0.2, 0.05, 0.1]


async def test_what_is_done_each_time_goes_on_after_a_failure() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("")
        if len(done) == 2:
            raise CriError("full")

    with capture_logs() as logs:
        async with kept(Task("cleaning", work, every=0.005)):
            await until(lambda: len(done) >= 6)
    assert [line["error"] for line in logs] == ["full"]


async def test_work_that_returns_has_nothing_more_to_do() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("")

    with capture_logs() as logs:
        async with kept(Task("once", work)) as keeping:
            await asyncio.sleep(0.05)  # it is not started again, and its end is not the daemon's
            assert not keeping.done()
    assert (len(done), logs) == (1, [])


async def test_without_a_vital_task_there_is_no_daemon_and_the_others_have_ended() -> None:
    ended: list[str] = []

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("")

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise OSError("the socket is gone")

    async def returns() -> None:
        await asyncio.sleep(0.01)

    tasks = Task("cleaning", other), Task("the server", fail, vital=True)
    with pytest.raises(CriError, match="cannot go on without the server, which has failed: the socket is gone"):
        await asyncio.wait_for(upkeep.keep(tasks, asyncio.Event()), 30)
    assert ended == [""]
    with pytest.raises(CriError, match="cannot go on without the server, which has ended"):
        await asyncio.wait_for(upkeep.keep([Task("the server", returns, vital=True)], asyncio.Event()), 30)


async def test_at_the_stop_the_last_is_ended_first_and_each_is_waited_for() -> None:
    order: list[str] = []

    def work(name: str) -> Callable[[], object]:
        async def run() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                order.append(name)

        return run

    async with kept(*(Task(name, work(name), vital=name == "a") for name in "abc")):  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
    assert order == ["c", "b", "a"]


async def test_the_checkpoint_goes_on_after_there_was_no_room_for_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.to_thread as it fails on a node that is out of processes."""
    store = Store(str(tmp_path / "db"))
    to_thread, calls = asyncio.to_thread, 0

    async def fail_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("can't start new thread")
        return await to_thread(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio, "to_thread", fail_once)
    store.write_now(Change("meta", "key", b"x" * 100_000))
    with capture_logs() as logs:
        async with kept(Task("the database's checkpoint", store.checkpoint, every=0.01)):
            await until(lambda: calls >= 3)
    assert [(line["task"], line["error"]) for line in logs] == [("the database's checkpoint", "can't start new thread")]
    # Without its log, the database has the record.
    with contextlib.closing(sqlite3.connect(f"file:{tmp_path}/db?immutable=1", uri=True)) as db:
        assert db.execute("SELECT length(value) FROM meta WHERE key = 'key'").fetchone() == (100_000,)
    store.close()


async def test_the_meter_goes_on_after_its_list_could_not_be_had() -> None:
    calls = 0

    def wanted() -> dict[str, bool]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("no list")
        return {"a": True}

    async def measure(_: str) -> tuple[int, int]:
        return 7, 1

    meter = DiskMeter(measure, wanted, period=0.01)
    with capture_logs() as logs:
        async with kept(Task("the measuring", meter.run)):
            await until(lambda: meter.latest("a") is not None)
    assert [(line["event"], line["error"]) for line in logs] == [(FAILED, "no list")]


async def test_the_watchdog_is_fed_also_where_a_socket_or_the_status_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "40000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        pings, asked = 0, 0

        def status() -> str:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise KeyError("c1")
            return "fine"

        def pinged() -> bool:
            nonlocal pings
            with contextlib.suppress(BlockingIOError):
                while True:
                    pings += b"WATCHDOG=1" in manager.recv(4096)
            return pings >= 5

        made = socket.socket
        failures = 0

        def fail_a_few_times(*arguments: object) -> socket.socket:
            nonlocal failures
            failures += 1
            if failures <= 4:
                raise OSError(24, "Too many open files")
            return made(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "socket", fail_a_few_times)
        with capture_logs() as logs:
            report = Task("the report", lambda: service_manager.report(status), max_pause=0.02)
            async with kept(report):
                await until(pinged)
    events = [line["event"] for line in logs]
    assert events.count("the service manager cannot be notified") == 1
    assert [line["error"] for line in logs if line["event"] == FAILED] == ["'c1'"]
    assert len(events) == 2


async def test_what_nobody_awaits_is_told_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise ValueError("unseen")

    def in_thread() -> None:
        raise ValueError("aside")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    loop = asyncio.get_running_loop()
    upkeep.hear_the_rest()
    with capture_logs() as logs:
        forgotten = asyncio.create_task(fail())
        await asyncio.wait([forgotten])
        del forgotten
        gc.collect()
        loop.call_soon(lambda: 1 / 0)
        thread = threading.Thread(target=in_thread, name="t")
        thread.start()
        thread.join()
        await asyncio.sleep(0)
    found = {line["event"].split(" <")[0].split(" test")[0]: str(line["exc_info"]) for line in logs}
    assert found["Task exception was never retrieved"] == "unseen"
    assert found["a thread failed"] == "aside"
    assert "division by zero" in found.values()


async def test_work_at_the_stop_that_fails_or_takes_too_long_is_told_of() -> None:
    async def fail() -> None:
        raise OSError("no")

    with capture_logs() as logs:
        await upkeep.finish(fail(), 5)
        await upkeep.finish(asyncio.sleep(0.05), 0.01)
        await asyncio.sleep(0.06)
    assert [line["event"] for line in logs] == [
        "work at the stop failed",
        "work was still under way at the stop; the next start finishes it",
    ]


async def test_a_server_that_takes_no_more_calls_ends_the_daemon_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's task that takes calls ends at the first that it cannot begin; nobody would hear of that."""
    loop = asyncio.get_running_loop()
    server = await listen(str(tmp_path / "socket"), [])
    make = loop.create_task

    def refuse(work: Coroutine[Any, Any, object], **more: Any) -> asyncio.Task[object]:
        if "rpc" in getattr(work, "__name__", ""):
            work.close()
            raise MemoryError("no room for a call")
        return make(work, **more)

    keeping = make(upkeep.keep([Task("the CRI server", lambda: ended(server), vital=True)], asyncio.Event()))
    monkeypatch.setattr(loop, "create_task", refuse)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        with pytest.raises(grpc.RpcError):
            call: Any = channel.unary_unary("/x/Y")
            await call(b"", timeout=30)
    monkeypatch.undo()
    with pytest.raises(CriError, match="without the CRI server, which has failed: no room for a call"):
        await asyncio.wait_for(keeping, 30)
    await server.stop(0)


async def test_a_server_that_is_kept_can_be_stopped(tmp_path: Path) -> None:
    server = await listen(str(tmp_path / "socket"), [])
    async with kept(Task("the CRI server", lambda: ended(server), vital=True)):
        await asyncio.sleep(0.01)
    await asyncio.wait_for(server.stop(0), 30)
