"""Work that outlives the call that asked for it.

The kubelet gives up on a call after its own deadline and asks again. The first attempt goes on here, and a
retry with the same request meets it: it waits for the same work, or is handed the outcome that nobody was
there to take.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

from criserver.errors import AlreadyExistsError

log = structlog.get_logger(__name__)

# When the caller of this call gives up, in seconds of the monotonic clock; None where it waits for ever.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

# An answer that is given so shortly before the caller gives up, in seconds, may find it gone: its clock started
# before ours, and that it is gone is told here only after a while.
_TOO_LATE = 1.0


@dataclass(slots=True)
class _Attempt:
    request: bytes
    task: asyncio.Task[str]
    waiting: int = 0


class Attempts:
    """Attempts under way or not yet told, by the name that they reserve."""

    def __init__(self) -> None:
        self._attempts: dict[str, _Attempt] = {}

    async def run(self, name: str, request: bytes, work: Callable[[], Awaitable[str]]) -> str:
        """What ``work`` returns, started at most once for ``name`` until somebody is told.

        Nobody is told where the caller was cancelled, or was about to give up when the outcome was there. Raises
        AlreadyExistsError where another request holds the name, and what ``work`` raises. A caller that is
        cancelled leaves the work running.
        """
        attempt = self._attempts.get(name)
        if attempt is not None and attempt.request != request:
            raise AlreadyExistsError(f"{name} is being made by another request; wait for it or raise the attempt")
        if attempt is None:
            attempt = _Attempt(request, asyncio.ensure_future(work()))
            self._attempts[name] = attempt
        attempt.waiting += 1
        try:
            outcome = await asyncio.shield(attempt.task)
        except asyncio.CancelledError:
            if attempt.task.cancelled():
                self._end(name, attempt)
            else:
                attempt.task.add_done_callback(lambda task: self._unheard(name, task))
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
        """Forget an attempt that somebody was told of; the name may be another's by now."""
        if self._attempts.get(name) is attempt:
            del self._attempts[name]

    def drop(self, name: str) -> None:
        """Forget an outcome nobody took: its sandbox or container is gone."""
        attempt = self._attempts.get(name)
        if attempt is not None and attempt.task.done():
            del self._attempts[name]

    async def finish(self) -> None:
        """Wait for all work under way, at the daemon's orderly stop."""
        await asyncio.gather(*(a.task for a in self._attempts.values()), return_exceptions=True)

    def _unheard(self, name: str, task: asyncio.Task[str]) -> None:
        """A failure that nobody waits for frees the name; a success waits for the retry."""
        attempt = self._attempts.get(name)
        if attempt is None or attempt.task is not task or attempt.waiting:
            return
        if task.cancelled() or task.exception() is not None:
            del self._attempts[name]
            words = "cancelled" if task.cancelled() else str(task.exception())
            log.warning("an attempt failed after its caller had gone", name=name, error=words)


def _about_to_give_up() -> bool:
    until = deadline.get()
    return until is not None and until - time.monotonic() < _TOO_LATE
