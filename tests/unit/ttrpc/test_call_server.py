"""A server that gets frames from a test: what it answers, what it refuses, and how much it takes at a time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from criserver.pb.ttrpc.ttrpc_pb2 import Response
from criserver.ttrpc import MAX_PAYLOAD, Handler, StatusCode, StreamChannel, TtrpcServer, call_server
from criserver.ttrpc.call_messages import MethodCall, encode_call
from criserver.ttrpc.message_frames import HEAD, MessageFlag, MessageType, message_frame

Serving = tuple[asyncio.Task[str], asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def served(handlers: Mapping[tuple[str, str], Handler]) -> AsyncIterator[Serving]:
    """A server's task, and the client's end of its socket."""
    ours, theirs = socket.socketpair()
    near, far = await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)
    task = asyncio.create_task(TtrpcServer(StreamChannel(*near), handlers).serve())
    try:
        yield task, *far
    finally:
        task.cancel()
        await asyncio.wait([task])
        far[1].close()


def request(stream: int, payload: bytes = b"", timeout: float | None = None, flags: int = 0) -> bytes:
    return message_frame(MessageType.REQUEST, stream, encode_call(MethodCall("s", "m", payload, timeout), {}), flags)


async def response(reader: asyncio.StreamReader) -> tuple[int, Response]:
    size, stream, kind, _ = HEAD.unpack(await reader.readexactly(HEAD.size))
    assert kind == MessageType.RESPONSE
    return stream, Response.FromString(await reader.readexactly(size))


async def never(payload: bytes) -> bytes:
    await asyncio.Event().wait()
    return payload


async def echo(payload: bytes) -> bytes:
    return payload


async def test_the_answer_on_the_wire() -> None:
    async with served({("s", "m"): echo}) as (_, reader, writer):
        writer.write(request(7, b"abc"))
        stream, answer = await response(reader)
        assert (stream, answer.status.code, answer.payload) == (7, 0, b"abc")


async def test_a_request_that_takes_longer_than_its_timeout() -> None:
    async with served({("s", "m"): never}) as (_, reader, writer):
        writer.write(request(1, timeout=0.001))
        assert (await response(reader))[1].status.code == StatusCode.DEADLINE_EXCEEDED


async def test_an_error_with_any_text_is_answered() -> None:
    async def failing(_: bytes) -> bytes:
        raise OSError(f"no file \udcff{'x' * 10_000}")  # the name of a file that is no UTF-8

    async with served({("s", "m"): failing}) as (_, reader, writer):
        writer.write(request(1))
        status = (await asyncio.wait_for(response(reader), 10))[1].status
        assert (status.code, status.message[:14]) == (StatusCode.INTERNAL, "no file \\udcff")
        assert len(status.message) < 5000


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (message_frame(MessageType.REQUEST, 1, b"\xff"), StatusCode.INVALID_ARGUMENT),
        (HEAD.pack(MAX_PAYLOAD + 1, 1, 1, 0) + bytes(MAX_PAYLOAD + 1), StatusCode.RESOURCE_EXHAUSTED),
        (request(1, flags=MessageFlag.REMOTE_OPEN), StatusCode.UNIMPLEMENTED),
        (request(1, flags=MessageFlag.REMOTE_CLOSED), StatusCode.UNIMPLEMENTED),
    ],
)
async def test_a_request_that_cannot_be_served_is_answered_and_the_next_one_served(wire: bytes, code: int) -> None:
    async with served({("s", "m"): echo}) as (_, reader, writer):
        writer.write(wire)
        stream, answer = await response(reader)
        assert (stream, answer.status.code) == (1, code)
        writer.write(request(3, b"next"))
        stream, answer = await response(reader)
        assert (stream, answer.payload) == (3, b"next")


async def test_a_client_that_breaks_the_protocol_is_disconnected() -> None:
    async with served({("s", "m"): echo}) as (task, reader, writer):
        writer.write(request(2))
        assert await task == "the client broke the protocol: stream 2 cannot be opened after stream 0"
        assert await reader.read() == b""


async def test_requests_end_with_the_connection() -> None:
    ended = asyncio.Event()
    started = asyncio.Event()

    async def waits(payload: bytes) -> bytes:
        started.set()
        try:
            return await never(payload)
        finally:
            ended.set()

    async with served({("s", "m"): waits}) as (task, _, writer):
        writer.write(request(1))
        await started.wait()
        writer.close()
        assert await task == "the client closed it"
        assert ended.is_set()


async def test_a_client_has_to_wait_while_too_much_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come in pieces that are read one at a time, so the bound is one piece above the limit."""
    monkeypatch.setattr(call_server, "MAX_RUNNING", 4)
    started: list[bytes] = []
    gate = asyncio.Event()

    async def waits(payload: bytes) -> bytes:
        started.append(payload)
        await gate.wait()
        return b""

    async with served({("s", "m"): waits}) as (_, reader, writer):
        for number in range(20):
            writer.write(request(1 + 2 * number, bytes(60_000)))
        while len(started) < 4:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(started) < 8
        gate.set()
        answered = [(await response(reader))[0] for _ in range(20)]
        assert sorted(answered) == [1 + 2 * number for number in range(20)]
