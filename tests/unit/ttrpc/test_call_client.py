"""Calls over a pair of sockets: a real server on the other side, or a peer that sends what a test says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from criserver.errors import NotFoundError
from criserver.pb.ttrpc.ttrpc_pb2 import Request
from criserver.ttrpc import MAX_PAYLOAD, CallError, Handler, StatusCode, StreamChannel, TtrpcClient, TtrpcServer
from criserver.ttrpc.call_messages import encode_answer, encode_failure
from criserver.ttrpc.message_frames import HEAD, MessageType, message_frame

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[TtrpcClient, Streams]]:
    """A client, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    near, far = await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)
    client = TtrpcClient(StreamChannel(*near), {"namespace": "k8s.io"})
    try:
        yield client, far
    finally:
        client.close()
        await client.wait_closed()
        far[1].close()


@asynccontextmanager
async def served(handlers: Mapping[tuple[str, str], Handler]) -> AsyncIterator[TtrpcClient]:
    """A client of a server with these handlers."""
    async with connected() as (client, far):
        task = asyncio.create_task(TtrpcServer(StreamChannel(*far), handlers).serve())
        yield client
        client.close()
        assert await task == "the client closed it"


async def echo(payload: bytes) -> bytes:
    return payload


async def received(far: Streams) -> tuple[int, Request]:
    """The next request that has come."""
    size, stream, _, _ = HEAD.unpack(await far[0].readexactly(HEAD.size))
    return stream, Request.FromString(await far[0].readexactly(size))


async def test_a_call_is_answered() -> None:
    async with served({("s", "m"): echo}) as client:
        assert await client.call("s", "m", b"abc", timeout=60) == b"abc"


async def test_the_request_on_the_wire() -> None:
    async with connected() as (client, far):
        call = asyncio.create_task(client.call("s", "m", b"abc", timeout=60))
        stream, request = await received(far)
        assert stream == 1
        assert (request.service, request.method, request.payload) == ("s", "m", b"abc")
        assert request.timeout_nano == 60_000_000_000
        assert [(pair.key, pair.value) for pair in request.metadata] == [("namespace", "k8s.io")]
        far[1].write(message_frame(MessageType.RESPONSE, 1, encode_answer(b"yes")))
        assert await call == b"yes"


async def test_many_calls_at_a_time_get_their_own_answers() -> None:
    """The answers come in the reverse order of the requests."""
    order: list[asyncio.Event] = [asyncio.Event() for _ in range(50)]
    order[-1].set()

    async def last_first(payload: bytes) -> bytes:
        number = int(payload)
        await order[number].wait()
        order[number - 1].set()
        return payload

    async with served({("s", "m"): last_first}) as client:
        calls = [client.call("s", "m", str(number).encode()) for number in range(50)]
        assert await asyncio.gather(*calls) == [str(number).encode() for number in range(50)]


async def test_errors_of_a_handler_have_their_codes() -> None:
    async def fails(payload: bytes) -> bytes:
        if payload == b"cri":
            raise NotFoundError("no such container")
        if payload == b"call":
            raise CallError(StatusCode.ABORTED, "not now")
        if payload == b"late":
            await asyncio.Event().wait()
        if payload == b"large":
            return bytes(MAX_PAYLOAD)
        raise ValueError("a fault")

    async with served({("s", "m"): fails}) as client:
        for payload, code, text in [
            (b"cri", StatusCode.NOT_FOUND, "no such container"),
            (b"call", StatusCode.ABORTED, "not now"),
            (b"large", StatusCode.RESOURCE_EXHAUSTED, "larger than"),
            (b"", StatusCode.INTERNAL, "a fault"),
        ]:
            with pytest.raises(CallError, match=text) as caught:
                await client.call("s", "m", payload)
            assert caught.value.code is code
            assert not caught.value.lost
        with pytest.raises(CallError) as caught:
            await client.call("s", "other", b"")
        assert caught.value.code is StatusCode.UNIMPLEMENTED


async def test_a_message_that_is_too_large_is_not_sent() -> None:
    async with served({("s", "m"): echo}) as client:
        with pytest.raises(CallError) as caught:
            await client.call("s", "m", bytes(MAX_PAYLOAD))
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert await client.call("s", "m", b"next") == b"next"


async def test_an_answer_that_is_too_large_fails_its_call_alone() -> None:
    async with connected() as (client, far):
        call = asyncio.create_task(client.call("s", "m", b""))
        await received(far)
        far[1].write(HEAD.pack(MAX_PAYLOAD + 1, 1, 2, 0) + bytes(MAX_PAYLOAD + 1))
        with pytest.raises(CallError) as caught:
            await call
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        other = asyncio.create_task(client.call("s", "m", b""))
        assert (await received(far))[0] == 3
        far[1].write(message_frame(MessageType.RESPONSE, 3, encode_answer(b"")))
        assert await other == b""


async def test_a_late_answer_is_ignored() -> None:
    async with connected() as (client, far):
        with pytest.raises(CallError) as caught:
            await client.call("s", "m", b"", timeout=0.001)
        assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        assert client._calls == {}
        assert client._streams.streams == ()
        await received(far)
        far[1].write(message_frame(MessageType.RESPONSE, 1, encode_answer(b"late")))
        call = asyncio.create_task(client.call("s", "m", b""))
        await received(far)
        far[1].write(message_frame(MessageType.RESPONSE, 3, encode_answer(b"in time")))
        assert await call == b"in time"


async def test_a_cancelled_call_is_forgotten() -> None:
    async with connected() as (client, far):
        call = asyncio.create_task(client.call("s", "m", b""))
        await received(far)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert client._calls == {}
        assert client._streams.streams == ()


async def test_calls_that_wait_for_room_send_nothing_when_they_are_given_up() -> None:
    async with connected() as (client, far):
        far[0]._transport.pause_reading()  # type: ignore[attr-defined]
        calls = [asyncio.create_task(client.call("s", "m", bytes(1 << 20))) for _ in range(20)]
        while client._streams.streams == ():
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(client._streams.streams) <= 2
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert client._streams.streams == ()


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "the server closed it"),
        (message_frame(MessageType.DATA, 1, b""), "the server broke the protocol: stream 1: data"),
        (
            message_frame(MessageType.RESPONSE, 1, b"\xff"),
            "the server broke the protocol: a response that is no message",
        ),
        (message_frame(MessageType.REQUEST, 2, b""), "the server broke the protocol: a request of a server"),
    ],
)
async def test_a_lost_connection_fails_all_calls(wire: bytes, reason: str) -> None:
    async with connected() as (client, far):
        calls = [asyncio.create_task(client.call("s", "m", b"")) for _ in range(3)]
        for _ in calls:
            await received(far)
        far[1].write(wire)
        if not wire:
            far[1].close()
        for call in [*calls, client.call("s", "m", b"")]:
            with pytest.raises(CallError, match=reason) as caught:
                await call
            assert caught.value.code is StatusCode.UNAVAILABLE
            assert caught.value.lost
        assert (await client.wait_closed()).startswith(reason)


async def test_a_status_that_grpc_does_not_have() -> None:
    async with connected() as (client, far):
        call = asyncio.create_task(client.call("s", "m", b""))
        await received(far)
        failure = encode_failure(StatusCode.ABORTED, "x").replace(b"\x08\x0a", b"\x08\x63")
        far[1].write(message_frame(MessageType.RESPONSE, 1, failure))
        with pytest.raises(CallError) as caught:
            await call
        assert caught.value.code is StatusCode.UNKNOWN
