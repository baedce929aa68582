"""Work that goes on where nobody waits for it any more."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)
_T = TypeVar("_T")


async def outlive(work: asyncio.Future[_T]) -> _T:
    """Await work that a cancelled caller leaves running; where it fails after that, the log is told.

    asyncio.shield alone lets go of it then, and the failure is complained of as one that nobody took.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_unheard)
        raise


def _unheard(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        log.warning("work failed after its caller had gone", error=str(error))
