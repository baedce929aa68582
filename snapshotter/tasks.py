"""Waiting for tasks: those that go on when their callers are cancelled, and two at once."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_S = TypeVar("_S")


async def outlive(work: asyncio.Future[_T]) -> _T:
    """Await work that goes on if the caller is cancelled. If it fails after that, the failure is logged.

    With asyncio.shield alone asyncio would log it as an exception that was never retrieved.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_unheard)
        raise


async def to_the_end(work: asyncio.Future[_T]) -> _T:
    """As :func:`outlive`, and a cancelled caller waits for the end of the work before it raises."""
    try:
        return await outlive(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _unheard(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        log.warning("work failed after its caller had gone", error=str(error))


class LastingTasks(Generic[_T]):
    """Tasks under way. Callers with the same key wait for the same task.

    It goes on when they are cancelled, unlike those of :class:`snapshotter.shared_task.SharedTasks`. A task that has
    been under way for ``patience`` seconds may never end: the next caller begins another one. The patience doubles with
    each that has not ended, so that there are few.
    """

    def __init__(self, patience: float = math.inf) -> None:
        self._patience = patience
        self._tasks: dict[Hashable, list[tuple[float, asyncio.Task[_T]]]] = {}
        self._count = 0

    def __len__(self) -> int:
        """How many are under way. Any thread may ask."""
        return self._count

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """The outcome of the last task with this key, which begins to do ``work`` if there is none to wait for."""
        now, tasks = time.monotonic(), self._tasks.setdefault(key, [])
        if not tasks or now - tasks[-1][0] > self._patience * 2 ** (len(tasks) - 1):
            begun = (now, asyncio.create_task(work()))
            tasks.append(begun)
            self._count += 1
            begun[1].add_done_callback(lambda _: self._ended(key, begun))
        return await outlive(tasks[-1][1])

    def _ended(self, key: Hashable, task: tuple[float, asyncio.Task[_T]]) -> None:
        self._count -= 1
        self._tasks[key].remove(task)
        if not self._tasks[key]:
            del self._tasks[key]


async def both(one: Coroutine[Any, Any, _T], other: Coroutine[Any, Any, _S]) -> tuple[_T, _S]:
    """Await both at once. If one fails, the other is still awaited. If both fail, the error of ``other`` is logged.

    A caller that is cancelled cancels both, and waits for their ends.
    """
    first, second = asyncio.ensure_future(one), asyncio.ensure_future(other)
    await asyncio.gather(first, second, return_exceptions=True)
    if first.exception() is not None and (error := second.exception()) is not None:
        log.warning("work failed beside other work that failed too", error=str(error))
    return first.result(), second.result()
