"""Work that goes on after its call was given up, so that a retry of the call finds it.

The kubelet gives up on a call at its own deadline and sends the same request again. The first attempt goes on here. The
retry waits for the same work, or gets its outcome if the work has ended meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

from criserver.errors import AlreadyExistsError
from criserver.telemetry import operations, spans

log = structlog.get_logger(__name__)

# When the caller of this call gives up, in seconds of the monotonic clock; None if it waits for ever.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

# Seconds. An answer given this shortly before the caller's deadline may come too late: the caller's clock started
# before ours, and gRPC reports its departure only after a while.
_TOO_LATE = 1.0


@dataclass(slots=True)
class _Attempt:
    request: bytes
    task: asyncio.Task[str]
    waiting: int = 0


class Attempts:
    """Attempts that are under way, or whose outcome no caller has received yet, by the name that they reserve."""

    def __init__(self) -> None:
        self._attempts: dict[str, _Attempt] = {}

    async def run(self, name: str, request: bytes, work: Callable[[], Awaitable[str]]) -> str:
        """Run ``work`` for ``name``, or wait for the attempt of the same request. Return what the work returns.

        An attempt is kept until a caller has received its outcome. Two kinds of caller do not count as such:

        1. A caller that was cancelled. The work goes on without it.
        2. A caller whose deadline was about to pass when the work ended.

        Raises AlreadyExistsError if another request holds the name, and what ``work`` raises.
        """
        attempt = self._attempts.get(name)
        if attempt is not None and attempt.request != request:
            raise AlreadyExistsError(f"{name} is being made by another request; wait for it or raise the attempt")
        joined = attempt is not None
        if attempt is None:
            attempt = _Attempt(request, asyncio.ensure_future(spans.held(work())))
            self._attempts[name] = attempt
        attempt.waiting += 1
        try:
            with operations.EARLIER_ATTEMPT.timed() if joined else nullcontext():
                outcome = await asyncio.shield(attempt.task)
        except asyncio.CancelledError:
            if attempt.task.cancelled():
                self._end(name, attempt)
            else:
                attempt.task.add_done_callback(lambda task: self._ended_without_caller(name, task))
            raise
        except BaseException:
            self._end(name, attempt)
            raise
        finally:
            attempt.waiting -= 1
        if not _about_to_give_up():
            self._end(name, attempt)
        return outcome

    def _end(self, name: str, attempt: _Attempt) -> None:
        """Forget an attempt whose outcome a caller has received. Another attempt may hold the name by now."""
        if self._attempts.get(name) is attempt:
            del self._attempts[name]

    def drop(self, name: str) -> None:
        """Forget an outcome that no caller has received: its sandbox or container is gone."""
        attempt = self._attempts.get(name)
        if attempt is not None and attempt.task.done():
            del self._attempts[name]

    async def finish(self) -> None:
        """Wait for all work under way, when the daemon stops."""
        await asyncio.gather(*(a.task for a in self._attempts.values()), return_exceptions=True)

    def _ended_without_caller(self, name: str, task: asyncio.Task[str]) -> None:
        """If no caller waits, a failed attempt frees its name. A successful one is kept for the retry."""
        attempt = self._attempts.get(name)
        if attempt is None or attempt.task is not task or attempt.waiting:
            return
        if task.cancelled() or task.exception() is not None:
            del self._attempts[name]
            message = "cancelled" if task.cancelled() else str(task.exception())
            log.warning("an attempt failed after its caller had gone", name=name, error=message)


def _about_to_give_up() -> bool:
    until = deadline.get()
    return until is not None and until - time.monotonic() < _TOO_LATE
