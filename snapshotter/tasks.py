"""Waiting for a task that goes on when its caller is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)
_T = TypeVar("_T")


async def outlive(work: asyncio.Future[_T]) -> _T:
    """Await work that goes on if the caller is cancelled. If it fails after that, the failure is logged.

    With asyncio.shield alone asyncio would log it as an exception that was never retrieved.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_unheard)
        raise


def _unheard(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        log.warning("work failed after its caller had gone", error=str(error))
