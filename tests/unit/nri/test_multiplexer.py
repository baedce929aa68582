"""Frames of NRI's multiplexer: their bytes, their sizes, and what a peer may not send."""

from __future__ import annotations

import asyncio
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from criserver.nri import multiplexer
from criserver.nri.multiplexer import Multiplexer
from criserver.ttrpc import MAX_PAYLOAD, TtrpcClient, TtrpcServer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Multiplexer, Streams]]:
    ours, theirs = socket.socketpair()
    near, far = await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)
    mux = Multiplexer(*near)
    try:
        yield mux, far
    finally:
        mux.close()
        far[1].close()


async def frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    connection, size = struct.unpack(">II", await reader.readexactly(8))
    return connection, await reader.readexactly(size)


@pytest.mark.parametrize("size", [1, 4096, 4097, MAX_PAYLOAD + 10])
async def test_a_message_fits_the_buffer_of_the_peers_library(size: int) -> None:
    """It reads through 4096 bytes, and takes more only as the rest of one message."""
    async with connected() as (mux, (reader, _)):
        mux.open(2).write(b"x" * size)
        sizes: list[int] = []
        while sum(sizes) < size:
            connection, data = await frame(reader)
            assert connection == 2
            sizes.append(len(data))
        assert sizes == [size] if size <= 4096 else [4096, size - 4096]


async def test_each_connection_gets_its_own() -> None:
    async with connected() as (mux, (_, writer)):
        one, two = mux.open(1), mux.open(2)
        running = asyncio.create_task(mux.run())
        writer.write(
            struct.pack(">II", 2, 1) + b"b" + struct.pack(">II", 7, 1) + b"?" + struct.pack(">II", 1, 1) + b"a"
        )
        assert (await one.read(), await two.read()) == (b"a", b"b")
        writer.close()
        assert await running == "the peer closed it"
        assert (await one.read(), await two.read()) == (b"", b"")


async def test_a_frame_that_is_too_large_ends_it() -> None:
    async with connected() as (mux, (_, writer)):
        running = asyncio.create_task(mux.run())
        writer.write(struct.pack(">II", 1, MAX_PAYLOAD + 11))
        assert "bytes, more than" in await running
        assert mux.closed


async def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplexer, "_MAX_UNREAD", 1000)
    async with connected() as (mux, (_, writer)):
        channel = mux.open(1)
        running = asyncio.create_task(mux.run())
        for _ in range(100):
            writer.write(struct.pack(">II", 1, 400) + bytes(400))
        while len(channel._unread) <= 1000:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(channel._unread) <= 1400
        size = 0
        while size < 40_000:
            size += len(await channel.read())
        mux.close()
        await running


async def test_many_small_frames_take_no_more_memory_than_large_ones() -> None:
    async with connected() as (mux, (_, writer)):
        channel = mux.open(1)
        running = asyncio.create_task(mux.run())
        writer.write((struct.pack(">II", 1, 1) + b"x") * 5_000)
        tracemalloc.start()
        try:
            while len(channel._unread) < 5_000:
                await asyncio.sleep(0)
            assert tracemalloc.get_traced_memory()[0] < 150_000
        finally:
            tracemalloc.stop()
        mux.close()
        await running


async def test_calls_in_both_directions_over_one_socket() -> None:
    async with connected() as (near, far_streams):
        far = Multiplexer(*far_streams)

        async def echo(payload: bytes) -> bytes:
            return payload

        handlers = {("s", "m"): echo}
        servers = [TtrpcServer(near.open(2), handlers), TtrpcServer(far.open(1), handlers)]
        clients = [TtrpcClient(near.open(1)), TtrpcClient(far.open(2))]
        tasks = [asyncio.create_task(work) for work in (near.run(), far.run(), *(s.serve() for s in servers))]
        large = b"x" * (MAX_PAYLOAD - 100)
        assert await asyncio.gather(*(client.call("s", "m", large) for client in clients)) == [large, large]
        near.close()
        await asyncio.gather(*tasks, *(client.wait_closed() for client in clients))
