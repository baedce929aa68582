"""Copies bytes between descriptors that do not block and a client's streams, at the pace of the slower side."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import termios
from typing import Protocol

# Bytes. Larger chunks were measured and are no faster. A client that reads nothing costs one chunk of memory.
CHUNK = 128 << 10


class ClientSource(Protocol):
    """Bytes from the client."""

    async def read(self) -> bytes | bytearray | memoryview:
        """The next bytes, b"" at the end. Raises ConnectionError where the client is gone."""


class ClientSink(Protocol):
    """Bytes to the client."""

    async def room(self) -> int:
        """Wait until more may be sent, and return how many bytes. Raises ConnectionError where the client is gone."""

    async def write(self, data: bytes) -> None:
        """Send, and wait until more may be sent. Raises ConnectionError where the client is gone."""


class OutputCopier:
    """Copies the output of a pipe, terminal or socket to a client.

    ``copied`` is the number of bytes copied so far. With :attr:`waiting` it tells whether any output still comes.
    """

    def __init__(self, fd: int, sink: ClientSink) -> None:
        self._fd = fd
        self._sink = sink
        self._sending = False
        self.copied = 0

    @property
    def waiting(self) -> bool:
        """Whether there is nothing to copy, also while the client takes no more (FIONREAD of ioctl_tty(2))."""
        if self._sending:
            return False
        try:
            count = fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4))
        except OSError:  # EIO: the other side of the terminal is closed
            return True
        return int.from_bytes(count, sys.byteorder) == 0

    async def run(self) -> None:
        """Copy until the end. Raises ConnectionError where the client is gone."""
        while True:
            # Wait for room before the read, and do not wait between both. So a connection keeps one chunk more than its
            # limit at most, however many copiers share it, and none that the client does not take.
            room = await self._sink.room()
            try:
                data = os.read(self._fd, min(room, CHUNK))
            except BlockingIOError:
                await ready(self._fd, write=False)
                continue
            except OSError:  # EIO: the other side of the terminal is closed
                return
            if not data:
                return
            self.copied += len(data)
            self._sending = True
            await self._sink.write(data)
            self._sending = False
            await asyncio.sleep(0)  # the other tasks' turn: with two fast sides the loop above never waits


async def copy_in(source: ClientSource, fd: int) -> None:
    """Copy a client's bytes into a pipe, terminal or socket until the client ends its stream.

    When the other side of the descriptor is closed, the rest is read and dropped: the client must not have to wait.
    """
    writable = True
    while data := await source.read():
        rest = memoryview(data)
        while writable and rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                await ready(fd, write=True)
            except OSError:
                writable = False


async def discard(source: ClientSource) -> None:
    """Read to the end."""
    while await source.read():
        pass


async def ready(fd: int, *, write: bool) -> None:
    """Wait until a descriptor can be read, or written to. A closed other side ends the wait too."""
    loop = asyncio.get_running_loop()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    future: asyncio.Future[None] = loop.create_future()
    add(fd, _settle, future)
    try:
        await future
    finally:
        remove(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
