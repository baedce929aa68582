"""The client's side of a connection: calls, any number of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from criserver.ttrpc.call_messages import MethodCall, decode_answer, encode_call
from criserver.ttrpc.call_streams import (
    CallStreams,
    Oversized,
    OversizedMessageError,
    ProtocolBroken,
    Responded,
    StreamMisuseError,
)
from criserver.ttrpc.channel import ByteChannel
from criserver.ttrpc.statuses import CallError, StatusCode


class TtrpcClient:
    """Calls over one channel. It needs a running event loop.

    A call that times out or is cancelled is forgotten here. The server is not told of a cancellation, because the
    protocol has no message for it; it knows the timeout.
    """

    def __init__(self, channel: ByteChannel, metadata: Mapping[str, str] | None = None) -> None:
        """``metadata`` is sent with each call."""
        self._channel = channel
        self._metadata = metadata or {}
        self._streams = CallStreams(client=True)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._sending = asyncio.Lock()
        self._reason = ""  # why the connection has ended
        self.fault = ""  # how the server broke the protocol
        self._reader = asyncio.create_task(self._read(), name="ttrpc client")

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None = None) -> bytes:
        """Call a method and return its answer. ``timeout`` is in seconds. Raises CallError."""
        request = encode_call(MethodCall(service, method, payload, timeout), self._metadata)
        try:
            async with asyncio.timeout(timeout):
                return await self._response(request)
        except TimeoutError as error:
            late = f"{service}/{method} was not answered within {timeout} s"
            raise CallError(StatusCode.DEADLINE_EXCEEDED, late, late=True) from error

    async def wait_closed(self) -> str:
        """Wait until the connection has ended, and return the reason."""
        await asyncio.wait([self._reader])
        return self._reason

    def close(self) -> None:
        """End the connection. Calls under way fail."""
        self._end("it was closed")

    async def _response(self, request: bytes) -> bytes:
        stream = 0
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            # One call at a time waits for room in the send buffer. So the buffer gets one message above its limit, and
            # a call that is given up while it waits has sent nothing.
            async with self._sending:
                await self._channel.drain()
                self._check_open()
                stream = self._streams.request(request)
                self._calls[stream] = answer
                self._channel.write(self._streams.take())
            return await answer
        except OversizedMessageError as error:
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, str(error), oversized=True) from error
        except StreamMisuseError as error:
            self._end(str(error))
            raise self._lost() from error
        except OSError as error:
            self._end(f"sending failed: {error}")
            raise self._lost() from error
        finally:
            self._calls.pop(stream, None)
            self._streams.abandon(stream)
            if answer.done() and not answer.cancelled():
                answer.exception()  # the caller may have gone in the meantime

    async def _read(self) -> None:
        try:
            while data := await self._channel.read():
                for event in self._streams.receive(data):
                    match event:
                        case Responded(stream, payload):
                            self._settle(stream, decode_answer(payload))
                        case Oversized(stream, size):
                            message = f"the server sent a message of {size} bytes"
                            self._settle(stream, CallError(StatusCode.RESOURCE_EXHAUSTED, message))
                        case ProtocolBroken(reason):
                            self._break(reason)
                            return
            self._end("the server closed it")
        except DecodeError:
            self._break("a response that is no message")
        except OSError as error:
            self._end(f"reading failed: {error}")

    def _settle(self, stream: int, outcome: bytes | CallError) -> None:
        answer = self._calls.get(stream)
        if answer is None or answer.done():
            return
        if isinstance(outcome, CallError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _break(self, reason: str) -> None:
        self.fault = f"the server broke the protocol: {reason}"
        self._end(self.fault)

    def _end(self, reason: str) -> None:
        if self._reason:
            return
        self._reason = reason
        self._channel.close()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._lost())

    def _check_open(self) -> None:
        if self._reason:
            raise self._lost()

    def _lost(self) -> CallError:
        return CallError(StatusCode.UNAVAILABLE, f"the connection has ended: {self._reason}", lost=True)
