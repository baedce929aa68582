"""The socket that plugins connect to. Until a plugin connects, the daemon has nothing else of NRI in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PluginSocket:
    """A listening socket, in a directory that only root can enter."""

    def __init__(self, path: str, connected: Connected) -> None:
        self._path = path
        self._connected = connected
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def listen(self) -> None:
        """Listen. A path that cannot be used is logged, and is no error: plugins cannot connect then.

        The socket of a runtime that serves is left alone.
        """
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            if _is_served(self._path):
                log.warning("another runtime serves the NRI socket, so no plugin can connect here", socket=self._path)
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._server = await asyncio.start_unix_server(self._connected, self._path)
            os.chmod(self._path, 0o600)
            self._inode = os.stat(self._path).st_ino
        except OSError as e:
            log.warning("the NRI socket cannot be made, so no plugin can connect", socket=self._path, error=str(e))

    def close(self) -> None:
        """Stop listening, and remove the socket unless another process has replaced it."""
        if self._server is None:
            return
        self._server.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except BlockingIOError:
            return True  # it listens, and its queue is full
        except OSError:
            return False
        return True
