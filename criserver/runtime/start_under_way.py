"""A start under way: how the shim says that it went, or that it is to end early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shims.messages import FailedEvent, ShimMessage, StartedEvent

# Seconds.
_GREETING_TIMEOUT = 2.0


class StartUnderWay:
    """One start of a process, from before it waits for anything.

    Attributes:
        outcome: what the shim says of the start, or a failure in its place where the shim has ended.

    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[StartedEvent | FailedEvent] = loop.create_future()
        self._cut: asyncio.Future[None] = loop.create_future()
        self._greeted: asyncio.Future[None] = loop.create_future()

    def cut(self) -> None:
        """Have the start end at once. A start that has succeeded meanwhile stays a success."""
        if not self._cut.done():
            self._cut.set_result(None)

    @property
    def is_cut(self) -> bool:
        """Whether the start is to end early."""
        return self._cut.done()

    def take(self, message: ShimMessage) -> bool:
        """Look at a message of the shim. True if it is the failure of the start, which the starter tells of."""
        if not self._greeted.done():
            self._greeted.set_result(None)
        if self.outcome.done() or "event" not in message or message["event"] not in ("started", "failed"):
            return False
        self.outcome.set_result(message)
        return message["event"] == "failed"

    def shim_ended(self) -> bool:
        """The shim's connection has closed. True if that ends the start, or its failure has ended it before."""
        if not self.outcome.done():
            error = "the shim ended before the container had started"
            self.outcome.set_result({"event": "failed", "error": error, "late": False})
        return self.outcome.result()["event"] == "failed"

    async def wait(self, seconds: float) -> bool:
        """Wait until there is an outcome or the start is cut, for so long at most; whether there is an outcome."""
        either: list[asyncio.Future[Any]] = [self.outcome, self._cut]
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not self.outcome.done():
            # A shim that is to be ended is found by its working directory, where it is once it has greeted.
            await asyncio.wait([self._greeted], timeout=_GREETING_TIMEOUT)
        return self.outcome.done()
