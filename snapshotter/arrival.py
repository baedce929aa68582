"""A layer that is unpacked while its blob is still being written.

The worker reads the file, and waits when it reaches the present end. The unpacked files stay in staging until the whole
blob is there and its digest is right. Then :meth:`Snapshotter.unpack` commits them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from snapshotter.errors import LayerError, SnapshotError
from snapshotter.threads import in_thread

_STEP = 256 << 10  # the worker is woken when so many bytes have come: to wake it more often costs time

Unpacked = tuple[str, dict[str, Any]]
"""A directory in staging, and the worker's result: size, inodes and whether the layer is opaque."""


class Arrival:
    """An unpack under way; made by :meth:`Snapshotter.arrival`.

    Its owner calls :meth:`grown` when the file has grown. At the end the owner gives it to Snapshotter.unpack, or
    closes it. ``pipe`` is the end of a pipe to the worker. ``discard`` deletes an unpacked layer that is not needed.
    """

    def __init__(self, task: asyncio.Task[Unpacked], pipe: int, discard: Callable[[str], object]) -> None:
        self._task = task
        self._pipe = pipe
        self._discard = discard
        self._told = 0
        self._void = False
        task.add_done_callback(lambda _: self._hang_up())

    def grown(self, size: int) -> None:
        """Tell the worker that the file has ``size`` bytes now."""
        if size < self._told + _STEP or self._pipe < 0:
            return
        self._told = size
        # 1. A full pipe wakes the worker anyway.
        # 2. A broken pipe means that the worker has failed; result() raises why.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, b"+")

    def give_up(self) -> None:
        """The blob begins anew, so what was unpacked is void. :meth:`result` will be None."""
        self._void = True
        self._task.cancel()

    async def result(self) -> Unpacked | None:
        """What was unpacked, once the whole file is there; None if the caller has to unpack it again.

        Raises LayerError. The caller commits or deletes what is returned. :meth:`close` does nothing for it then.
        """
        self._hang_up()
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            await self.close()
            raise
        if self._void:
            await self.close()  # the worker may have ended before: with a layer, or with an error of the first bytes
            return None
        if self._task.cancelled():
            return None
        try:
            return self._task.result()
        except LayerError:
            raise
        except SnapshotError:
            return None  # the download may have been slower than the worker's time limits allow

    async def close(self) -> None:
        """End the unpack, and delete what it has made."""
        if self._task.cancel():
            await asyncio.wait([self._task])
        elif not self._task.cancelled() and self._task.exception() is None:
            await in_thread(self._discard, self._task.result()[0])

    def _hang_up(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
