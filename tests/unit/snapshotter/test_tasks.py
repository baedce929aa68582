"""Work that outlives its caller, and work beside other work: each failure is taken, so that asyncio does not log it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time

import pytest
from structlog.testing import capture_logs

from snapshotter.tasks import LastingTasks, both, outlive
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


async def turns() -> None:
    """Let each task go as far as it can without waiting."""
    for _ in range(5):
        await asyncio.sleep(0)


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


async def test_both_go_on_at_once() -> None:
    turn = asyncio.Event()

    async def first() -> str:
        await turn.wait()
        return "first"

    async def second() -> int:
        turn.set()
        return 2

    assert await both(first(), second()) == ("first", 2)


async def test_one_that_fails_leaves_the_other_to_its_end(complaints: list[str]) -> None:
    gate, ended = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        await gate.wait()
        ended.set()

    async def failing(words: str) -> None:
        raise ValueError(words)

    work = asyncio.ensure_future(both(slow(), failing("at once")))
    await turns()
    assert not work.done()
    gate.set()
    with pytest.raises(ValueError, match="at once"):
        await work
    assert ended.is_set()
    with capture_logs() as logs, pytest.raises(ValueError, match="one"):
        await both(failing("one"), failing("other"))
    assert [line["error"] for line in logs] == ["other"]
    gc.collect()
    assert complaints == []


async def test_a_caller_that_is_cancelled_waits_for_the_ends_of_both(complaints: list[str]) -> None:
    gate = threading.Event()
    work = asyncio.ensure_future(both(in_thread(gate.wait), asyncio.sleep(60)))
    await turns()
    work.cancel()
    await turns()
    assert not work.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert complaints == []


async def test_callers_do_not_wait_for_a_task_that_hangs_forever() -> None:
    """A network file system may answer again after it was mounted anew; the call that hangs in the old one does not."""
    tasks: LastingTasks[int] = LastingTasks(patience=10)
    now, gates = [0.0], [asyncio.Event() for _ in range(3)]
    begun = itertools.count()

    async def work() -> int:
        number = next(begun)
        await gates[number].wait()
        return number

    async def call(at: float) -> asyncio.Task[int]:
        now[0] = at
        task = asyncio.create_task(tasks.run("key", work))
        await turns()
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        # The patience doubles: 10 s for the first, 20 s for the second.
        calls = [await call(at) for at in (0, 9, 11, 30, 32)]
        assert len(tasks) == 3
        for gate in reversed(gates):
            gate.set()
            await turns()
    assert [await task for task in calls] == [0, 0, 1, 1, 2]
    assert len(tasks) == 0
    assert await tasks.run("key", turns_to_four) == 4


async def turns_to_four() -> int:
    await turns()
    return 4
