"""A repeated request waits for its first attempt."""

from __future__ import annotations

import asyncio
import time

import pytest

from criserver.errors import AlreadyExistsError, NotFoundError
from criserver.runtime.attempts import Attempts, deadline
from tests.support.waiting import cancelled


class Work:
    """Counts how often it was started and ends when told."""

    def __init__(self) -> None:
        self.started = 0
        self.end = asyncio.Event()

    async def __call__(self) -> str:
        self.started += 1
        await self.end.wait()
        return f"id-{self.started}"


async def done(attempts: Attempts) -> None:
    """The work that is under way is at its end, and all that waits for it has heard of it."""
    await asyncio.wait([attempt.task for attempt in attempts._attempts.values()])
    await asyncio.sleep(0)


async def test_a_retry_during_the_work_waits_for_it() -> None:
    attempts, work = Attempts(), Work()
    await cancelled(attempts.run("pod", b"r", work))
    retry = asyncio.ensure_future(attempts.run("pod", b"r", work))
    await asyncio.sleep(0)
    work.end.set()
    assert await retry == "id-1"
    assert work.started == 1


async def test_a_retry_after_the_work_is_handed_the_outcome_nobody_took() -> None:
    attempts, work = Attempts(), Work()
    await cancelled(attempts.run("pod", b"r", work))
    work.end.set()
    await done(attempts)
    assert await attempts.run("pod", b"r", work) == "id-1"
    assert await attempts.run("pod", b"r", work) == "id-2", "once told, the next is a call of its own"


async def test_an_outcome_that_came_as_the_caller_gave_up_is_handed_to_its_retry() -> None:
    attempts, work = Attempts(), Work()
    work.end.set()

    async def call(seconds: float) -> str:
        deadline.set(time.monotonic() + seconds)
        return await attempts.run("pod", b"r", work)

    assert await asyncio.create_task(call(0.01)) == "id-1", "which its caller may not have read any more"
    assert await asyncio.create_task(call(60)) == "id-1"
    assert await asyncio.create_task(call(60)) == "id-2"


async def test_an_outcome_nobody_took_is_dropped_with_its_sandbox() -> None:
    attempts, work = Attempts(), Work()
    await cancelled(attempts.run("pod", b"r", work))
    work.end.set()
    await done(attempts)
    attempts.drop("pod")
    assert await attempts.run("pod", b"r", work) == "id-2"


async def test_another_request_for_the_name_is_refused() -> None:
    attempts, work = Attempts(), Work()
    await cancelled(attempts.run("pod", b"r", work))
    with pytest.raises(AlreadyExistsError, match="pod"):
        await attempts.run("pod", b"other", work)
    work.end.set()
    await attempts.finish()


async def test_a_failure_frees_the_name_whether_somebody_waits_or_not() -> None:
    attempts = Attempts()

    async def fail() -> str:
        await asyncio.sleep(0.005)
        raise NotFoundError("no such image")

    with pytest.raises(NotFoundError):
        await attempts.run("pod", b"r", fail)
    await cancelled(attempts.run("pod", b"r", fail))
    await done(attempts)
    work = Work()
    work.end.set()
    assert await attempts.run("pod", b"other", work) == "id-1"
