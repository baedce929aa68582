"""Blocking calls beside the event loop, and what becomes of them where the node has no room for another thread."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from snapshotter.tasks import outlive

_T = TypeVar("_T")


class Threads(ThreadPoolExecutor):
    """A pool that makes do with the threads it has where it gets no more.

    Where it has none at all, submit() raises OSError, and the call is not made. The standard pool raises RuntimeError
    in both cases and makes the call later all the same, on what its caller has closed by then.
    """

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError as e:
            if not self._threads:
                self._work_queue.get_nowait()  # nobody takes from it, so this is the call just put
                raise _no_room(e) from e


def start_thread(work: Callable[[], None], name: str) -> None:
    """Run in a thread of its own, which ends with the process. Raises OSError where there is no room for one."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as e:
        raise _no_room(e) from e


def _no_room(error: RuntimeError) -> OSError:
    """What pthread_create(3) says: a limit of processes is reached, of the service (TasksMax), a cgroup or the node."""
    return OSError(errno.EAGAIN, f"{error}; is a limit of processes reached?")


async def in_thread(function: Callable[..., _T], *arguments: Any, executor: Executor | None = None) -> _T:
    """Run in a thread; a cancelled caller waits for its end, as what it works on must not be closed under it."""
    work = asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    try:
        return await outlive(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
