"""What the daemon does by itself, beside its calls: tasks that go on until it stops, and whose failures are heard.

One that fails is started again after a pause, which grows for as long as it fails. Without a vital one there is no
daemon: it ends, with the reason, and its service manager starts it anew.
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

# Seconds, before a task that has failed is started again: at first, and where it does nothing but fail.
_PAUSE = 1.0
_MAX_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Task:
    """Work that goes on until it is cancelled; or, with ``every``, that is done anew so many seconds after its end.

    Where other work returns, it has nothing more to do; vital work never does. ``max_pause`` is in seconds.
    """

    name: str
    work: Callable[[], Awaitable[object]]
    every: float | None = None
    vital: bool = False
    max_pause: float = _MAX_PAUSE


async def keep(tasks: Sequence[Task], stop: asyncio.Event) -> None:
    """Keep tasks going until ``stop`` is set; none of them runs any more then. The last is ended first.

    Raises CriError where a vital one has failed.
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
    """Wait so long for work at the daemon's stop, and leave it to the next start then. A failure is logged."""
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        log.warning("work was still under way at the stop; the next start finishes it")
    elif error := task.exception():
        log.error("work at the stop failed", exc_info=error)


def hear_the_rest() -> None:
    """Have the log told what nobody awaits: of the running loop's callbacks and forgotten tasks, and of threads."""

    def loop_failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        about = {name: repr(value) for name, value in context.items() if name not in ("message", "exception")}
        log.error(context["message"], exc_info=context.get("exception"), **about)

    def thread_failed(arguments: threading.ExceptHookArgs) -> None:
        name = None if arguments.thread is None else arguments.thread.name
        log.error("a thread failed", thread=name, exc_info=arguments.exc_value)

    asyncio.get_running_loop().set_exception_handler(loop_failed)
    threading.excepthook = thread_failed
