"""The gRPC server on a unix socket. All RPCs of a service are registered, also those that are not implemented."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from criserver import logs
from criserver.api import bounds
from criserver.errors import CriError, UnimplementedError, disk_fault, exhaustion, words_of
from criserver.runtime.attempts import deadline
from criserver.telemetry import families, spans
from criserver.telemetry.spans import Trace
from criserver.text import status

log = structlog.get_logger(__name__)

# Bytes of the largest message where the configuration does not set it. The kubelet has the same limit.
MAX_MESSAGE = 16 << 20

# File descriptors: more than a gRPC server opens.
_DESCRIPTORS = 16
# Metadata by which a call joins its caller's trace (W3C Trace Context).
_TRACE_HEADERS = ("traceparent", "tracestate")

# RPCs that last as long as their client wants.
_ENDLESS = frozenset({"GetContainerEvents"})

# Codes of errors that are no fault of the node.
_ROUTINE = ("ALREADY_EXISTS", "CANCELLED", "NOT_FOUND", "UNIMPLEMENTED")

Handler = Callable[[Any], Awaitable[Any]]
_Call = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


def method_name(rpc: str) -> str:
    """The Python name of an RPC: RunPodSandbox is run_pod_sandbox."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", rpc).lower()


def generic_handler(
    descriptor: ServiceDescriptor,
    service: object,
    missing: Mapping[str, str],
    name: str = "",
    before: Handler | None = None,
) -> grpc.GenericRpcHandler:
    """All RPCs of a service. An RPC without a method of ``service`` answers UNIMPLEMENTED.

    ``missing`` has the feature of each RPC that is not implemented. ``name`` replaces the name of the service on the
    wire. ``before`` is awaited with each request before its method. Raises KeyError for an RPC that has no method and
    is not in ``missing``.
    """
    handlers = {}
    for method in descriptor.methods:
        implementation = getattr(service, method_name(method.name), None)
        if implementation is None:
            implementation = _absent(method.name, missing[method.name], streams=method.server_streaming)
        handlers[method.name] = _rpc(method, implementation, before or _nothing)
    return grpc.method_handlers_generic_handler(name or descriptor.full_name, handlers)


async def _nothing(_: Any) -> None:
    """Wait for nothing before an RPC."""


def _rpc(method: MethodDescriptor, implementation: Handler, before: Handler) -> Any:
    request = GetMessageClass(method.input_type).FromString
    if method.server_streaming:
        streaming = _streaming_call(method, implementation, before)
        return grpc.unary_stream_rpc_method_handler(streaming, request, _serialize)
    call = _unary_call(method, implementation, before)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(call, request, _serialize)
    return grpc.unary_unary_rpc_method_handler(call, request, _serialize)


def _serialize(response: Message | bytes) -> bytes:
    """Serialise an answer. Lists are bytes already, joined from serialised entries."""
    return response if isinstance(response, bytes) else response.SerializeToString()


class _Observed:
    """One RPC in the metrics and in the traces, from its begin to its end. Its answer or error is sent after that.

    ``code`` and ``error`` are those that it ends with. ``trace`` is None for an RPC that is not traced.
    """

    __slots__ = ("_began", "_labels", "_timed", "code", "error", "trace")

    def __init__(self, labels: tuple[str, str], trace: Trace | None, *, timed: bool) -> None:
        self._labels = labels
        self._timed = timed
        self.trace = trace
        self.code = grpc.StatusCode.OK
        self.error = ""

    def __enter__(self) -> _Observed:
        families.RPCS_IN_FLIGHT.add(1, *self._labels)
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.code is grpc.StatusCode.OK:
            self.code = grpc.StatusCode.CANCELLED  # the caller has gone; the RPC's own errors do not come here
        if self.trace is not None:
            self.trace.answered(self.code.name, self.error)
        if not families.RPCS.is_on:
            return
        families.RPCS_IN_FLIGHT.add(-1, *self._labels)
        families.RPCS.add(1, *self._labels, self.code.name)
        if self._timed:
            families.RPC_DURATION.observe(time.monotonic() - self._began, *self._labels)


def _unary_call(method: MethodDescriptor, implementation: Handler, before: Handler) -> _Call:
    """The implementation; its errors become gRPC statuses."""

    labels = method.containing_service.name, method.name

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        remaining = context.time_remaining()
        deadline.set(None if remaining is None else time.monotonic() + remaining)
        answer = None
        with logs.Call(labels[1]) as this, _Observed(labels, _trace(method, this, context), timed=True) as observed:
            try:
                with spans.within(observed.trace):
                    if isinstance(request, Message):  # not for a stream of requests
                        bounds.check(request)
                        await before(request)
                    answer = await implementation(request)
                log.debug("call done", seconds=logs.elapsed())
            except Exception as e:  # noqa: BLE001 - the caller gets any error, and the daemon goes on
                observed.code, observed.error = _status(labels[1], e)
        if observed.code is not grpc.StatusCode.OK:
            await context.abort(observed.code, observed.error)
        return answer

    return call


def _trace(method: MethodDescriptor, call: logs.Call, context: grpc.aio.ServicerContext[Any, Any]) -> Trace | None:
    """The trace of a call, if it is kept or sent to a collector."""
    metadata = {}
    if spans.is_exporting():
        pairs = context.invocation_metadata() or ()
        metadata = {key: value for key, value in pairs if key in _TRACE_HEADERS and isinstance(value, str)}
    trace = spans.traced(method.containing_service.full_name, method.name, call.number, call.about, metadata)
    if trace is not None and trace.sample is not None:
        call.trace_id = trace.sample.trace_id
    return trace


def _streaming_call(method: MethodDescriptor, implementation: Any, before: Handler) -> _Call:
    labels = method.containing_service.name, method.name
    endless = method.name in _ENDLESS

    # Not a generator: the end of a call may close that in another context, and the blocks must end in their own.
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with (
            logs.Call(labels[1], endless=endless) as this,
            _Observed(labels, _trace(method, this, context), timed=False) as observed,
        ):
            try:
                with spans.within(observed.trace):
                    bounds.check(request)
                    await before(request)
                    async with aclosing(implementation(request)) as answers:
                        async for answer in answers:
                            await context.write(answer)
                log.debug("call done", seconds=logs.elapsed())
            except Exception as e:  # noqa: BLE001 - the caller gets any error, and the daemon goes on
                observed.code, observed.error = _status(labels[1], e)
        if observed.code is not grpc.StatusCode.OK:
            await context.abort(observed.code, observed.error)

    return call


def _status(rpc: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """The code and the text of an error. The text may have foreign parts, so its length is limited here."""
    if isinstance(error, ExceptionGroup):
        return _status(rpc, error.exceptions[0])  # of concurrent tasks; the others were cancelled
    if reason := exhaustion(error):
        message = status(f"{rpc}: {words_of(error)} ({reason})")
        log.warning("call failed: the node has run out of something", error=message, rpc=rpc, seconds=logs.elapsed())
        return grpc.StatusCode.RESOURCE_EXHAUSTED, message
    if reason := disk_fault(error):
        code = error.code if isinstance(error, CriError) else CriError.code
        message = status(f"{rpc}: {error} ({reason})" if isinstance(error, CriError) else f"{rpc}: {reason}")
        log.error("call failed: a disk or file system does not work", error=message, rpc=rpc, seconds=logs.elapsed())
        return grpc.StatusCode[code], message
    if isinstance(error, CriError):
        message = status(str(error))
        # A kubelet asks for what is gone as a matter of routine.
        tell = log.info if error.code in _ROUTINE else log.warning
        tell("call failed", error=message, code=error.code, rpc=rpc, seconds=logs.elapsed())
        return grpc.StatusCode[error.code], message
    log.error("call failed", rpc=rpc, exc_info=error, seconds=logs.elapsed())
    return grpc.StatusCode.INTERNAL, status(f"{rpc}: {type(error).__name__}: {words_of(error)}")


def _absent(rpc: str, feature: str, *, streams: bool) -> Any:
    message = f"{rpc} is not supported yet: this version has no {feature}"

    async def refuse(_: Any) -> Any:
        raise UnimplementedError(message)

    async def refuse_stream(_: Any) -> AsyncIterator[Any]:
        raise UnimplementedError(message)
        yield

    return refuse_stream if streams else refuse


async def listen(
    address: str,
    handlers: list[grpc.GenericRpcHandler],
    *,
    max_request: int = MAX_MESSAGE,
    max_answer: int = MAX_MESSAGE,
) -> grpc.aio.Server:
    """A server on the unix socket ``address``, for root alone. Raises CriError where it cannot be bound.

    ``max_request`` and ``max_answer`` are the bytes of the largest messages. Raises OSError without descriptors for it.
    """
    _find_descriptors()
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_request),
            ("grpc.max_send_message_length", max_answer),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers(tuple(handlers))
    os.makedirs(os.path.dirname(address), mode=0o711, exist_ok=True)
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{address}")
    except RuntimeError as e:
        raise CriError(f"cannot listen on {address}: {e}") from e
    finally:
        os.umask(mask)
    await server.start()
    return server


def _find_descriptors() -> None:
    """Raises OSError if the process has few descriptors left. gRPC would end the process then."""
    found = [end.detach() for end in socket.socketpair()]
    try:
        while len(found) < _DESCRIPTORS:
            found.append(os.dup(found[0]))
    finally:
        for fd in found:
            os.close(fd)


async def ended(server: grpc.aio.Server) -> None:
    """Wait until a server accepts no more calls. Raises the error that ended it, unless it was stopped."""
    # Shielded: a server cannot be stopped any more after its wait is cancelled.
    await asyncio.shield(server.wait_for_termination())
