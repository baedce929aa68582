"""When a registry is asked again, and after which time.

A failure that may be over soon (a busy server, a broken connection) is tried again after growing waits, and after the
server's own Retry-After. Other failures are not tried again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from criserver.errors import UnavailableError

# Statuses of failures that may be over soon; Cloudflare's are above 510, and say that it does not reach the registry.
TEMPORARY = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
MAX_WAIT = 30.0  # seconds: the longest Retry-After of a server that a pull waits for

_ATTEMPTS = 5
_FIRST_WAIT = 0.5


class TryAgainError(UnavailableError):
    """A failure that may be over soon; ``after`` is the server's Retry-After in seconds."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Retries:
    """The retries of one request. They end after some attempts, or ``patience`` seconds, without progress."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.progressed()

    def progressed(self) -> None:
        """Something was achieved: count anew."""
        self._failures = 0
        self._deadline = time.monotonic() + self._patience

    def forgive(self, seconds: float) -> None:
        """Do not count ``seconds`` that were spent waiting in a queue."""
        self._deadline += seconds

    async def wait(self, after: float) -> bool:
        """Wait at least ``after`` seconds before another attempt. Returns False at once if there is to be none."""
        self._failures += 1
        pause = max(after, _FIRST_WAIT * 2 ** (self._failures - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
        if self._failures >= _ATTEMPTS or time.monotonic() + pause > self._deadline:
            return False
        await asyncio.sleep(pause)
        return True


def retry_after(headers: Mapping[str, str]) -> float:
    """The Retry-After of a response in seconds (RFC 9110, section 10.2.3); 0 if it is missing or invalid."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
