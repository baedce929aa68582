"""The daemon's background tasks. They run until it stops, and their failures are logged.

1. A task that fails is started again after a pause. The pause grows while the task keeps failing.
2. If a vital task fails, the daemon ends with the reason, and its service manager starts it again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from criserver.errors import CriError

log = structlog.get_logger(__name__)

# Seconds before a task that has failed is started again: the first time, and at most.
_PAUSE = 1.0
_MAX_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Task:
    """A background task.

    1. With ``every``, the work is repeated that many seconds after its end.
    2. Without it, the work goes on until it is cancelled. If it returns, it has nothing more to do.
    3. ``vital`` work must never return.

    ``max_pause`` is in seconds.
    """

    name: str
    work: Callable[[], Awaitable[object]]
    every: float | None = None
    vital: bool = False
    max_pause: float = _MAX_PAUSE


async def keep(tasks: Sequence[Task], stop: asyncio.Event) -> None:
    """Run tasks until ``stop`` is set, then cancel them, the last one first, and wait for their end.

    Raises CriError if a vital task has failed.
    """
    running = [asyncio.create_task(_run(task), name=task.name) for task in tasks]
    stopped = asyncio.create_task(stop.wait(), name="stop")
    vital = [work for work, task in zip(running, tasks, strict=True) if task.vital]
    try:
        done, _ = await asyncio.wait([stopped, *vital], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for work in (stopped, *reversed(running)):
            work.cancel()
            await asyncio.wait([work])
    for work in done:
        work.result()


async def _run(task: Task) -> None:
    loop = asyncio.get_running_loop()
    pause = min(_PAUSE, task.max_pause)
    while True:
        begun = loop.time()
        try:
            await task.work()
            while task.every is not None:
                await asyncio.sleep(task.every)
                await task.work()
        except Exception as e:
            if task.vital:
                raise CriError(f"the daemon cannot go on without {task.name}, which has failed: {e}") from e
            if loop.time() - begun > task.max_pause:
                pause = min(_PAUSE, task.max_pause)
            log.exception("a task failed; it is started again", task=task.name, pause=pause, error=str(e))
        else:
            if task.vital:
                raise CriError(f"the daemon cannot go on without {task.name}, which has ended")
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, task.max_pause)


async def finish(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Wait up to ``seconds`` for work at the daemon's stop. The next start finishes the rest. A failure is logged."""
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        log.warning("work was still under way at the stop; the next start finishes it")
    elif error := task.exception():
        log.error("work at the stop failed", exc_info=error)


def hear_the_rest() -> None:
    """Log errors that no caller gets: those of the running loop's callbacks, of forgotten tasks and of threads."""

    def loop_failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        about = {name: repr(value) for name, value in context.items() if name not in ("message", "exception")}
        log.error(context["message"], exc_info=context.get("exception"), **about)

    def thread_failed(arguments: threading.ExceptHookArgs) -> None:
        name = None if arguments.thread is None else arguments.thread.name
        log.error("a thread failed", thread=name, exc_info=arguments.exc_value)

    asyncio.get_running_loop().set_exception_handler(loop_failed)
    threading.excepthook = thread_failed
