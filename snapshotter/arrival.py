"""A layer that is unpacked while its blob is still being written.

The worker reads the file and waits at its present end. What it makes stays in staging until the blob is whole and known
to be the right one; :meth:`Snapshotter.unpack` commits it then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from snapshotter.errors import LayerError, SnapshotError
from snapshotter.threads import in_thread

_STEP = 256 << 10  # bytes for which a worker is woken: for less it does not pay

Unpacked = tuple[str, dict[str, Any]]
"""A directory in staging, and what the worker says of what is in it."""


class Arrival:
    """An unpack under way; made by :meth:`Snapshotter.arrival`.

    Its maker tells it how the file grows, and hands it to Snapshotter.unpack or closes it. ``pipe`` leads to the
    worker, ``discard`` deletes what was unpacked in vain.
    """

    def __init__(self, task: asyncio.Task[Unpacked], pipe: int, discard: Callable[[str], object]) -> None:
        self._task = task
        self._pipe = pipe
        self._discard = discard
        self._told = 0
        task.add_done_callback(lambda _: self._hang_up())

    def grown(self, size: int) -> None:
        """The file has ``size`` bytes at this moment."""
        if size < self._told + _STEP or self._pipe < 0:
            return
        self._told = size
        # Full: it has enough to wake it. Broken: it has failed, which result() tells.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, b"+")

    def give_up(self) -> None:
        """What was written is void; :meth:`result` will be None."""
        self._task.cancel()

    async def result(self) -> Unpacked | None:
        """What was unpacked of the file, which is whole now; None where that is to be tried anew.

        Raises LayerError. What is returned is the caller's to commit or delete; there is no closing then.
        """
        self._hang_up()
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            await self.close()
            raise
        if self._task.cancelled():
            return None
        try:
            return self._task.result()
        except LayerError:
            raise
        except SnapshotError:
            return None  # as it may have been the wait that was too long

    async def close(self) -> None:
        """End it, and leave nothing of it."""
        if self._task.cancel():
            await asyncio.wait([self._task])
        elif not self._task.cancelled() and self._task.exception() is None:
            await in_thread(self._discard, self._task.result()[0])

    def _hang_up(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
