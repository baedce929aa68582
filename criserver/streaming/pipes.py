"""Between descriptors that do not block and the streams of a client, at the pace of the slower side."""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

# Bytes. More at once is measured to be no faster, and a frame of this size is what a stalled client costs.
CHUNK = 128 << 10


class Source(Protocol):
    """Bytes from the client."""

    async def read(self) -> bytes | bytearray | memoryview:
        """The next bytes, b"" at the end. Raises ConnectionError where the client is gone."""


class Sink(Protocol):
    """Bytes to the client."""

    async def room(self) -> None:
        """Wait until more may be sent. Raises ConnectionError where the client is gone."""

    async def write(self, data: bytes) -> None:
        """Send, and wait until more may be sent. Raises ConnectionError where the client is gone."""


class Outflow:
    """Copies what comes out of a pipe, terminal or socket to a client.

    ``waiting`` is true while there is nothing to copy. ``moved`` is the number of bytes copied so far. Both together
    tell whether any output still comes.
    """

    def __init__(self, fd: int, sink: Sink) -> None:
        self._fd = fd
        self._sink = sink
        self.waiting = False
        self.moved = 0

    async def run(self) -> None:
        """Copy until the end. Raises ConnectionError where the client is gone."""
        while True:
            # Before reading, with nothing to wait for in between: however many share a connection, one chunk goes
            # beyond what it may keep.
            await self._sink.room()
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                self.waiting = True
                await ready(self._fd, write=False)
                self.waiting = False
                continue
            except OSError:  # EIO: a terminal has no other side any more
                return
            if not data:
                return
            self.moved += len(data)
            await self._sink.write(data)
            await asyncio.sleep(0)  # others' turn: neither side may ever have to be waited for


async def copy_in(source: Source, fd: int) -> None:
    """Copy what comes from a client into a pipe, terminal or socket until the client ends it.

    What nobody takes any more is read and dropped: the client is not to be held up by it.
    """
    taken = True
    while data := await source.read():
        rest = memoryview(data)
        while taken and rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                await ready(fd, write=True)
            except OSError:
                taken = False


async def discard(source: Source) -> None:
    """Read to the end."""
    while await source.read():
        pass


async def ready(fd: int, *, write: bool) -> None:
    """Wait until a descriptor can be read, or written to; also where its other side is gone."""
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
