"""Calls and their outcomes as the messages Request and Response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from criserver.pb.ttrpc.ttrpc_pb2 import KeyValue, Request, Response, Status
from criserver.text import status
from criserver.ttrpc.statuses import CallError, StatusCode

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A request. ``timeout`` is in seconds, None for no limit."""

    service: str
    method: str
    payload: bytes
    timeout: float | None


def encode_call(call: MethodCall, metadata: Mapping[str, str]) -> bytes:
    """The payload of a request."""
    return Request(
        service=call.service,
        method=call.method,
        payload=call.payload,
        timeout_nano=0 if call.timeout is None else max(1, int(call.timeout * _NANO)),
        metadata=[KeyValue(key=key, value=value) for key, value in metadata.items()],
    ).SerializeToString()


def decode_call(payload: bytes) -> MethodCall:
    """A request's payload. Raises CallError (INVALID_ARGUMENT)."""
    try:
        request = Request.FromString(payload)
    except DecodeError as error:
        raise CallError(StatusCode.INVALID_ARGUMENT, "the request is no message") from error
    timeout = request.timeout_nano / _NANO if request.timeout_nano > 0 else None
    return MethodCall(request.service, request.method, request.payload, timeout)


def encode_answer(payload: bytes) -> bytes:
    """The payload of a response to a call that succeeded."""
    return Response(status=Status(), payload=payload).SerializeToString()


def encode_failure(code: StatusCode, message: str) -> bytes:
    """The payload of a response to a call that failed. The message becomes printable and bounded."""
    return Response(status=Status(code=code, message=status(message))).SerializeToString()


def decode_answer(payload: bytes) -> bytes | CallError:
    """The answer in a response's payload, or the server's status. Raises DecodeError.

    A code that gRPC does not have is UNKNOWN.
    """
    response = Response.FromString(payload)
    code = response.status.code
    if code == StatusCode.OK:
        return response.payload
    known = StatusCode(code) if code in _CODES else StatusCode.UNKNOWN
    return CallError(known, response.status.message)


_CODES = frozenset(StatusCode)
