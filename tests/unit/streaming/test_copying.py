"""When the output of a command is at its end, though the client takes no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from criserver.streaming import OutputCopier
from tests.support.waiting import cancelled, until


class Client:
    """Takes ``room`` bytes, and then nothing, as a client whose window is used up. ``slow`` holds up what is sent."""

    def __init__(self, room: int) -> None:
        self.left = room
        self.taken = b""
        self.slow = asyncio.Event()
        self.slow.set()

    async def room(self) -> int:
        if not self.left:
            await asyncio.Event().wait()
        return self.left

    async def write(self, data: bytes) -> None:
        await self.slow.wait()
        self.left -= len(data)
        self.taken += data


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


async def test_nothing_is_left_to_copy_though_the_client_takes_no_more(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    client = Client(5)
    copier = OutputCopier(reader, client)
    os.write(writer, b"whole")
    task = asyncio.create_task(copier.run())
    await until(lambda: client.taken == b"whole")
    assert copier.waiting
    os.write(writer, b"more")
    assert not copier.waiting
    await cancelled(task)


async def test_what_is_being_sent_is_left_to_copy(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    client = Client(100)
    client.slow.clear()
    copier = OutputCopier(reader, client)
    os.write(writer, b"whole")
    task = asyncio.create_task(copier.run())
    await until(lambda: copier.copied == 5)
    assert not copier.waiting
    client.slow.set()
    await until(lambda: client.taken == b"whole")
    assert copier.waiting
    await cancelled(task)
