"""The server's side of a connection: each request is a task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from criserver.errors import CriError
from criserver.text import quoted
from criserver.ttrpc.call_messages import MethodCall, decode_call, encode_answer, encode_failure
from criserver.ttrpc.call_streams import (
    CallStreams,
    Oversized,
    OversizedMessageError,
    ProtocolBroken,
    Requested,
    StreamEvent,
)
from criserver.ttrpc.channel import ByteChannel
from criserver.ttrpc.statuses import CallError, StatusCode

log = structlog.get_logger()

Handler = Callable[[bytes], Awaitable[bytes]]
"""Serves a method. It raises CriError or CallError for a call that fails."""

MAX_RUNNING = 64
"""The requests that run at a time."""

MAX_HELD = 8 << 20
"""The bytes of running requests above which nothing is read from the channel."""


class TtrpcServer:
    """Serves one channel. While too much is under way it does not read, so the client has to wait."""

    def __init__(self, channel: ByteChannel, handlers: Mapping[tuple[str, str], Handler]) -> None:
        """``handlers`` is by service and method."""
        self._channel = channel
        self._handlers = handlers
        self._streams = CallStreams(client=False)
        self._sending = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._held = 0
        self.fault = ""  # how the client broke the protocol
        self._room = asyncio.Event()

    async def serve(self) -> str:
        """Serve until the connection ends, and return the reason. Requests that run then are cancelled.

        Cancel it to end the connection.
        """
        try:
            return await self._serve()
        except OSError as error:
            return f"reading failed: {error}"
        finally:
            self._channel.close()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _serve(self) -> str:
        while data := await self._channel.read():
            for event in self._streams.receive(data):
                if isinstance(event, ProtocolBroken):
                    self.fault = f"the client broke the protocol: {event.reason}"
                    return self.fault
                self._begin(event)
            while len(self._running) >= MAX_RUNNING or self._held >= MAX_HELD:
                self._room.clear()
                await self._room.wait()
        return "the client closed it"

    def _begin(self, event: StreamEvent) -> None:
        """Start the work that an event needs. Data needs none: no method takes a stream of data."""
        if not isinstance(event, Requested | Oversized):
            return
        size = len(event.payload) if isinstance(event, Requested) else 0
        self._held += size
        task = asyncio.create_task(self._answer(event), name="ttrpc request")
        self._running.add(task)
        task.add_done_callback(lambda task: self._done(task, size))

    def _done(self, task: asyncio.Task[None], size: int) -> None:
        self._held -= size
        self._running.discard(task)
        self._room.set()

    async def _answer(self, event: Requested | Oversized) -> None:
        response = await self._outcome(event)
        try:
            async with self._sending:
                await self._channel.drain()
                try:
                    self._streams.respond(event.stream, response)
                except OversizedMessageError as error:
                    failure = encode_failure(StatusCode.RESOURCE_EXHAUSTED, str(error))
                    self._streams.respond(event.stream, failure)
                self._channel.write(self._streams.take())
        except OSError:
            self._channel.close()  # the loop of reads has the reason

    async def _outcome(self, event: Requested | Oversized) -> bytes:
        try:
            return encode_answer(await self._call(event))
        except CallError as error:
            return encode_failure(error.code, error.message)
        except CriError as error:
            return encode_failure(StatusCode[error.code], str(error))
        except TimeoutError:
            return encode_failure(StatusCode.DEADLINE_EXCEEDED, "the call took longer than its timeout")
        except Exception as error:
            log.exception("a ttrpc request failed", error=str(error))
            return encode_failure(StatusCode.INTERNAL, str(error))

    async def _call(self, event: Requested | Oversized) -> bytes:
        if isinstance(event, Oversized):
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"a message of {event.size} bytes")
        call = decode_call(event.payload)
        if not event.unary:
            raise CallError(StatusCode.UNIMPLEMENTED, f"{_name(call)} does not take a stream of data")
        handler = self._handlers.get((call.service, call.method))
        if handler is None:
            raise CallError(StatusCode.UNIMPLEMENTED, f"there is no method {_name(call)}")
        async with asyncio.timeout(call.timeout):
            return await handler(call.payload)


def _name(call: MethodCall) -> str:
    return quoted(f"{call.service}/{call.method}")
