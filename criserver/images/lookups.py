"""Lookups of the names of registries and proxies, in threads of their own.

A lookup holds its thread until the DNS servers have answered, or for half a minute if they do not. The threads that
containers need are not held meanwhile, and a daemon that stops does not wait for a lookup.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Any

from snapshotter.tasks import LastingTasks
from snapshotter.threads import in_loose_thread

# Lookups at the same time. The others wait for their turn.
_LOOKUPS = 16
# Seconds. A lookup that takes longer may never end. Its place is free then, and the next caller begins another one.
_PATIENCE = 60.0

Address = tuple[Any, ...]


class Lookups:
    """The lookups of a node. Callers with the same question wait for the same lookup.

    It goes on when they are cancelled, as nothing can end it, and a pull that is tried again waits for it too.
    """

    def __init__(self) -> None:
        self._tasks: LastingTasks[list[Address]] = LastingTasks(_PATIENCE)
        self._room = asyncio.Semaphore(_LOOKUPS)

    async def addresses(self, host: str, port: int, family: int = 0, flags: int = 0) -> list[Address]:
        """The results of getaddrinfo(3) for TCP. Raises OSError."""
        question = (host, port, family, socket.SOCK_STREAM, 0, flags)
        return await self._tasks.run(question, partial(self._look_up, question))

    async def _look_up(self, question: tuple[Any, ...]) -> list[Address]:
        async with self._room:
            lookup = asyncio.ensure_future(in_loose_thread(partial(_addresses, question), "lookup"))
            await asyncio.wait({lookup}, timeout=_PATIENCE)
        return await lookup


def _addresses(question: tuple[Any, ...]) -> list[Address]:
    return list(socket.getaddrinfo(*question))
