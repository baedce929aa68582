"""Blocking calls beside the event loop, on things that their caller closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from snapshotter.tasks import outlive

_T = TypeVar("_T")


async def in_thread(function: Callable[..., _T], *arguments: Any, executor: Executor | None = None) -> _T:
    """Run in a thread; a cancelled caller waits for its end, as what it works on must not be closed under it."""
    work = asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    try:
        return await outlive(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
