"""When a registry is asked once more, and how long after.

What may be different the next time (a busy server, a broken connection) is tried again with growing waits, and a
server's own Retry-After is kept to. What stays the same is not.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from criserver.errors import UnavailableError

MAX_WAIT = 30.0  # of seconds that a pull waits where a server asks for it

_ATTEMPTS = 5
_FIRST_WAIT = 0.5


class TryAgainError(UnavailableError):
    """A failure that may be over soon; ``after`` is how many seconds the server asks to be left alone."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Retries:
    """How often one thing has been tried in vain. It ends after some attempts, or ``patience`` seconds, without
    progress.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.progressed()

    def progressed(self) -> None:
        """Something was achieved: count anew."""
        self._failures = 0
        self._deadline = time.monotonic() + self._patience

    def forgive(self, seconds: float) -> None:
        """Leave out of account what was spent in a queue."""
        self._deadline += seconds

    async def wait(self, after: float) -> bool:
        """Wait before another attempt, at least ``after`` seconds; False, at once, where there is to be none."""
        self._failures += 1
        pause = max(after, _FIRST_WAIT * 2 ** (self._failures - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
        if self._failures >= _ATTEMPTS or time.monotonic() + pause > self._deadline:
            return False
        await asyncio.sleep(pause)
        return True


def retry_after(headers: Mapping[str, str]) -> float:
    """The Retry-After of a response in seconds (RFC 9110, section 10.2.3); 0 where there is none that can be read."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
