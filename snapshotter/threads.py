"""Blocking calls in threads beside the event loop, also on a node that has no room for another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from snapshotter.errors import no_thread
from snapshotter.tasks import to_the_end

_T = TypeVar("_T")


class Threads(ThreadPoolExecutor):
    """A pool that goes on with the threads that it has if the system gives it no more.

    If it has none at all, submit() raises OSError, and the call is not made. The standard pool raises RuntimeError in
    both cases and makes the call later nevertheless, on files that its caller has closed by then.
    """

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError as e:
            if not self._threads:
                self._work_queue.get_nowait()  # no thread takes from the queue, so this is the call just put
                raise no_thread(e) from e


def start_thread(work: Callable[[], None], name: str) -> None:
    """Run in a new thread, which ends with the process. Raises OSError if there is no room for one."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as e:
        raise no_thread(e) from e


async def in_loose_thread(function: Callable[[], _T], name: str) -> _T:
    """Run in a new thread, which ends with the process: the process does not wait for it, as it does for a pool's.

    A cancelled caller does not wait for its end. Raises OSError if there is no room for a thread.
    """
    loop = asyncio.get_running_loop()
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as e:  # noqa: BLE001 - the caller raises it
            outcome.set_exception(e)

    start_thread(work, name)
    return await asyncio.shield(asyncio.wrap_future(outcome, loop=loop))


async def in_thread(function: Callable[..., _T], *arguments: Any, executor: Executor | None = None) -> _T:
    """Run in a thread. A cancelled caller waits for its end, so that no file is closed while the thread uses it."""
    return await to_the_end(asyncio.get_running_loop().run_in_executor(executor, function, *arguments))


# Containers make trees whose deletion takes minutes. Other work has threads beside these.
deletions = Threads(4, "deletions")
