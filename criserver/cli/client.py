"""Calls to a running daemon, with its own error messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from criserver.errors import CriError

_MAX_MESSAGE = 16 << 20


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel to the daemon at the unix socket ``address``. Calls that are still under way at the end are cancelled.

    Raises CriError with the daemon's message if it refuses a call, or if it does not answer.
    """
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE)]
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        try:
            yield channel
        except grpc.RpcError as e:
            raise CriError(words(address, e)) from e


def method(channel: grpc.Channel, service: ServiceDescriptor, name: str) -> Any:
    """A function that calls an RPC. It takes and returns a message, or an iterator for an RPC with a stream."""
    found = service.methods_by_name[name]
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
    }
    return kinds[found.client_streaming, found.server_streaming](
        f"/{service.full_name}/{name}",
        request_serializer=_serialize,
        response_deserializer=GetMessageClass(found.output_type).FromString,
    )


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def words(address: str, error: grpc.RpcError) -> str:
    """The error message for the operator."""
    assert isinstance(error, grpc.Call)
    details = str(error.details())
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        return f"no daemon answers at {address}; start one with `criserver serve`"
    if error.code() is grpc.StatusCode.UNIMPLEMENTED and "Method not found" in details:
        return f"the daemon at {address} has an older version than this command; restart it"
    return details
