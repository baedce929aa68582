"""Work that outlives its caller: each failure is taken, so that asyncio does not log it."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from structlog.testing import capture_logs

from snapshotter.tasks import outlive
from snapshotter.threads import in_thread
from tests.support.waiting import cancelled


@pytest.fixture
async def complaints() -> list[str]:
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context["message"]))
    return found


async def fail(gate: asyncio.Event) -> None:
    await gate.wait()
    raise ValueError("too late")


async def test_who_waits_has_the_outcome() -> None:
    async def work() -> int:
        return 7

    gate = asyncio.Event()
    gate.set()
    assert await outlive(asyncio.ensure_future(work())) == 7
    with capture_logs() as logs, pytest.raises(ValueError, match="too late"):
        await outlive(asyncio.ensure_future(fail(gate)))
    assert logs == []


async def test_a_failure_after_the_caller_had_gone_is_told_in_the_log(complaints: list[str]) -> None:
    gate = asyncio.Event()
    with capture_logs() as logs:
        work: asyncio.Future[object] = asyncio.ensure_future(fail(gate))
        await cancelled(outlive(work))
        assert not work.done()
        gate.set()
        await asyncio.wait([work])
        del work
        await asyncio.sleep(0)
        gc.collect()
    assert [(line["event"], line["error"]) for line in logs] == [("work failed after its caller had gone", "too late")]
    assert complaints == []


async def test_a_thread_that_fails_after_its_caller_was_cancelled(complaints: list[str]) -> None:
    gate = threading.Event()

    def work() -> None:
        gate.wait()
        raise OSError("busy")

    with capture_logs() as logs:
        call = asyncio.create_task(in_thread(work))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.sleep(0)
        assert not call.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0)
        gc.collect()
    assert [line["error"] for line in logs] == ["busy"]
    assert complaints == []
