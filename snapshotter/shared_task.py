"""A task that several callers wait for together, and that is cancelled with the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from snapshotter.tasks import outlive

_Key = TypeVar("_Key", bound=Hashable)
_Note = TypeVar("_Note")
_T = TypeVar("_T")


class _Shared(Generic[_T]):
    def __init__(self, task: asyncio.Task[_T]) -> None:
        self.task = task
        self.waiters = 0


class SharedTasks(Generic[_Key, _Note, _T]):
    """The tasks under way, one for each key.

    ``notes`` has, for each key that has a task, the note that its first caller has left.
    """

    def __init__(self) -> None:
        self._tasks: dict[_Key, _Shared[_T]] = {}
        self._notes: dict[_Key, _Note] = {}
        self.notes: Mapping[_Key, _Note] = MappingProxyType(self._notes)

    async def run(self, key: _Key, note: _Note, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """The outcome of the task with this key, which begins to do ``work`` if there is none.

        1. A caller that is cancelled leaves the task to the others.
        2. If there is no other caller, the task is cancelled too, and this returns when it has ended. A caller that
           comes meanwhile begins a new task.
        """
        shared = self._tasks.get(key)
        if shared is None:
            shared = self._tasks[key] = _Shared(asyncio.create_task(work()))
            self._notes[key] = note
            begun = shared
            begun.task.add_done_callback(lambda _: self._forget(key, begun))
        shared.waiters += 1
        try:
            return await outlive(shared.task)
        except asyncio.CancelledError:
            if shared.waiters == 1 and not shared.task.done():
                self._forget(key, shared)
                shared.task.cancel()
                await asyncio.wait([shared.task])
            raise
        finally:
            shared.waiters -= 1

    def _forget(self, key: _Key, shared: _Shared[_T]) -> None:
        if self._tasks.get(key) is shared:
            del self._tasks[key]
            del self._notes[key]
