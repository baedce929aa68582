"""Sockets in a pod's network namespace."""

from __future__ import annotations

import asyncio
import socket

from criserver.network.namespace_calls import enter
from snapshotter.threads import start_thread


async def stream_socket(path: str | None, family: int) -> socket.socket:
    """A TCP socket, which does not block, in the network namespace pinned at ``path``; None for the node's namespace.

    Raises OSError where the namespace does not exist, or has no such address family.
    """
    if path is None:
        return _stream_socket(family)
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[socket.socket] = loop.create_future()

    def work() -> None:
        try:
            with open(path) as file:
                enter([file.fileno()])
            made = _stream_socket(family)
        except OSError as e:
            loop.call_soon_threadsafe(settle, e)
        else:
            loop.call_soon_threadsafe(settle, made)

    def settle(result: socket.socket | OSError) -> None:
        if isinstance(result, OSError):
            if not outcome.done():
                outcome.set_exception(result)
        elif outcome.done():
            result.close()
        else:
            outcome.set_result(result)

    # A thread of its own, not a pooled one: it cannot leave the namespace that it enters.
    start_thread(work, "dial")
    return await outcome


def _stream_socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
