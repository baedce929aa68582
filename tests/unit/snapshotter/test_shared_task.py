"""A task that several callers wait for together."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from snapshotter.shared_task import SharedTasks


class Work:
    """Counts how often it has begun and ended.

    It ends when ``end`` is set, with ``error`` if there is one. If there is ``late``, it waits for that when it ends.
    """

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.end = asyncio.Event()
        self.late: asyncio.Event | None = None
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        try:
            await self.end.wait()
            if self.error:
                raise self.error
            return number
        finally:
            if self.late:
                await self.late.wait()
            self.ended += 1


@pytest.fixture
def tasks() -> SharedTasks[str, str, int]:
    return SharedTasks()


async def callers(tasks: SharedTasks[str, str, int], work: Work, count: int) -> list[asyncio.Task[int]]:
    found = [asyncio.create_task(tasks.run("key", f"note {number}", work)) for number in range(count)]
    for _ in range(2):  # the callers begin, then the task that they share
        await asyncio.sleep(0)
    return found


async def ended(caller: asyncio.Task[int]) -> None:
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_callers_with_one_key_share_one_task(tasks: SharedTasks[str, str, int]) -> None:
    work = Work()
    waiting = await callers(tasks, work, 3)
    assert dict(tasks.notes) == {"key": "note 0"}
    work.end.set()
    assert await asyncio.gather(*waiting) == [1, 1, 1]
    assert dict(tasks.notes) == {}
    assert await tasks.run("key", "", work) == 2, "the one after that is a task of its own"


async def test_other_keys_have_other_tasks(tasks: SharedTasks[str, str, int]) -> None:
    work = Work()
    work.end.set()
    assert [*await asyncio.gather(tasks.run("one", "", work), tasks.run("other", "", work))] == [1, 2]


async def test_all_callers_have_the_failure(tasks: SharedTasks[str, str, int]) -> None:
    work = Work()
    work.error = ValueError("broken")
    waiting = await callers(tasks, work, 2)
    work.end.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert found == [work.error, work.error]
    assert dict(tasks.notes) == {}


async def test_a_cancelled_caller_leaves_the_task_to_the_others(tasks: SharedTasks[str, str, int]) -> None:
    work = Work()
    first, second = await callers(tasks, work, 2)
    await ended(first)
    assert (work.begun, work.ended) == (1, 0)
    work.end.set()
    assert await second == 1


async def test_the_task_has_ended_when_its_last_caller_has(tasks: SharedTasks[str, str, int]) -> None:
    work = Work()
    for caller in await callers(tasks, work, 2):
        await ended(caller)
    assert (work.begun, work.ended) == (1, 1)
    assert dict(tasks.notes) == {}


async def test_a_caller_that_comes_while_the_task_is_being_cancelled_begins_a_new_one(
    tasks: SharedTasks[str, str, int],
) -> None:
    work = Work()
    work.late = asyncio.Event()
    (first,) = await callers(tasks, work, 1)
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()
    (second,) = await callers(tasks, work, 1)
    assert (work.begun, work.ended) == (2, 0)
    work.late.set()
    await asyncio.wait([first])
    assert first.cancelled()
    assert dict(tasks.notes) == {"key": "note 0"}, "the end of the first has not forgotten the second"
    work.end.set()
    assert await second == 2


async def test_a_failure_of_the_cancelled_task_is_logged(tasks: SharedTasks[str, str, int]) -> None:
    async def work() -> int:
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("not undone")

    caller = asyncio.create_task(tasks.run("key", "", work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with capture_logs() as logs:
        await ended(caller)
        await asyncio.sleep(0)
    assert [line["error"] for line in logs] == ["not undone"]
