"""Work that outlives its caller: each failure is taken, so that asyncio does not log it."""

from __future__ import annotations

import asyncio
import gc
import time

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


async def fail() -> None:
    await asyncio.sleep(0.01)
    raise ValueError("too late")


async def test_who_waits_has_the_outcome() -> None:
    async def work() -> int:
        return 7

    assert await outlive(asyncio.ensure_future(work())) == 7
    with capture_logs() as logs, pytest.raises(ValueError, match="too late"):
        await outlive(asyncio.ensure_future(fail()))
    assert logs == []


async def test_a_failure_after_the_caller_had_gone_is_told_in_the_log(complaints: list[str]) -> None:
    with capture_logs() as logs:
        work: asyncio.Future[object] = asyncio.ensure_future(fail())
        await cancelled(outlive(work))
        assert not work.done()
        await asyncio.wait([work])
        del work
        await asyncio.sleep(0)
        gc.collect()
    assert [(line["event"], line["error"]) for line in logs] == [("work failed after its caller had gone", "too late")]
    assert complaints == []


async def test_a_thread_that_fails_after_its_caller_was_cancelled(complaints: list[str]) -> None:
    def work() -> None:
        time.sleep(0.05)
        raise OSError("busy")

    with capture_logs() as logs:
        await cancelled(in_thread(work))
        await asyncio.sleep(0)
        gc.collect()
    assert [line["error"] for line in logs] == ["busy"]
    assert complaints == []
