"""Calls to a running daemon, with its own error messages."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from criserver.errors import CriError, UnavailableError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

ADMIN = admin.DESCRIPTOR.services_by_name["AdminService"]
IMAGES = cri.DESCRIPTOR.services_by_name["ImageService"]
RUNTIME = cri.DESCRIPTOR.services_by_name["RuntimeService"]


class NoAnswerError(UnavailableError):
    """No daemon can be reached at the socket."""


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel to the daemon at the unix socket ``address``. Calls that are still under way at the end are cancelled.

    Raises CriError with the daemon's message if it refuses a call, and NoAnswerError if it cannot be reached.
    """
    # The daemon's grpc.max_send_message_size limits its answers.
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        try:
            yield channel
        except grpc.RpcError as e:
            raise failure(address, e) from e


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


def failure(address: str, error: grpc.RpcError) -> CriError:
    """The error for the operator."""
    assert isinstance(error, grpc.Call)
    details = str(error.details())
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        return NoAnswerError(_obstacle(address))
    if error.code() is grpc.StatusCode.UNIMPLEMENTED and "Method not found" in details:
        return CriError(f"the daemon at {address} has an older version than this command; restart it")
    return CriError(details)


def _obstacle(address: str) -> str:
    """Why the socket cannot be connected to. gRPC does not tell the cause in a form that can be relied on."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            probe.connect(address)
    except PermissionError:
        return f"the socket {address} may not be opened by this user; run the command as root"
    except OSError:
        # There is no socket, or nobody listens at it.
        if os.path.exists(address) and not stat.S_ISSOCK(os.stat(address).st_mode):
            return f"{address} is not a socket; name the daemon's by --address, or by grpc.address in the configuration"
    return f"no daemon answers at {address}; start one with `criserver serve`"


def as_json(message: Message) -> dict[str, Any]:
    """A message with all its fields, also the empty ones, under their JSON names. 64-bit numbers stay numbers."""
    return {field.json_name: _value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _value(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_one(field, item) for item in value]
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value
