"""One output stream of the container: it is read in blocks, logged, and copied to the attached clients."""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .log_writer import LogWriter
    from .loop import Loop

_READ_SIZE = 64 * 1024  # the size of a pipe; measured: larger reads from larger pipes are no faster
_PATIENCE = 10.0  # seconds


class Output:
    """The reading end of a pipe, or a console's master side. `ended` turns true at the end of the stream."""

    __slots__ = ("_clients", "_fd", "_log", "_loop", "_name", "_reading", "ended")

    def __init__(self, loop: Loop, fd: int, name: str, log: LogWriter) -> None:
        """Take over `fd`. `name` is "stdout" or "stderr", as in the log."""
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._name = name
        self._log = log
        self._clients: dict[int, _Client] = {}
        self._reading = False
        self.ended = False
        self._settle()

    def attach(self, fd: int) -> None:
        """Take over `fd`, the writing end of a pipe or a socket, and copy all further output to it.

        A client whose pipe is full pauses the stream, as a slow terminal does. A client that reads nothing for ten
        seconds is dropped. Raises OSError, and leaves `fd` open, if `fd` is neither a pipe nor a socket.
        """
        if self.ended:
            os.close(fd)
            return
        self._clients[fd] = _Client(self._loop, fd, self._client_moved)

    def detach(self) -> None:
        """Drop all clients."""
        for client in list(self._clients.values()):
            client.close()

    def end(self) -> None:
        """Stop reading, log an unfinished line, and close the clients' descriptors: the clients see the end."""
        if self.ended:
            return
        self.ended = True
        self._settle()
        os.close(self._fd)
        self._log.end(self._name)
        self.detach()

    def _client_moved(self, client: _Client) -> None:
        if client.closed:
            del self._clients[client.fd]
        self._settle()

    def _settle(self) -> None:
        """Watch the stream unless it has ended or a client is behind.

        A paused stream is not in epoll at all: epoll would report a hang-up again and again, with no event asked for.
        """
        reading = not self.ended and not any(client.rest for client in self._clients.values())
        if reading and not self._reading:
            self._loop.watch(self._fd, select.EPOLLIN, self._readable)
        elif self._reading and not reading:
            self._loop.forget(self._fd)
        self._reading = reading

    def _readable(self, _events: int) -> None:
        try:
            block = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # EIO: the console has no other side any more
            block = b""
        if not block:
            self.end()
            return
        self._log.write(self._name, block)
        for client in list(self._clients.values()):
            client.send(block)


class _Client:
    """A client that gets a copy of the output. `rest` is the part of the last block that it has not taken yet."""

    __slots__ = ("_loop", "_moved", "_timer", "closed", "fd", "rest")

    def __init__(self, loop: Loop, fd: int, moved: Callable[[_Client], None]) -> None:
        """`moved` is called when `rest` or `closed` has changed."""
        loop.watch(fd, 0, self._event)
        os.set_blocking(fd, False)
        self._loop = loop
        self._moved = moved
        self._timer: object = None
        self.fd = fd
        self.rest = b""
        self.closed = False

    def send(self, block: bytes) -> None:
        """Write a block. Not allowed while there is a `rest`."""
        self._write(block)
        if self.rest:
            self._loop.change(self.fd, select.EPOLLOUT)
            self._moved(self)

    def close(self) -> None:
        self._loop.cancel(self._timer)
        self._loop.forget(self.fd)
        os.close(self.fd)
        self.rest = b""
        self.closed = True
        self._moved(self)

    def _event(self, events: int) -> None:
        if events & (select.EPOLLERR | select.EPOLLHUP):
            self.close()
            return
        self._write(self.rest)
        if not self.rest and not self.closed:
            self._loop.change(self.fd, 0)
            self._moved(self)

    def _write(self, block: bytes) -> None:
        self._loop.cancel(self._timer)
        try:
            sent = os.write(self.fd, block)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        self.rest = block[sent:]
        if self.rest:
            self._timer = self._loop.later(_PATIENCE, self.close)
