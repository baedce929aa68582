"""``criserver image``: what an operator asks of a running daemon about its images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

import grpc

from criserver.errors import CriError, InvalidArgumentError
from criserver.pb.criserver.v1 import admin_pb2 as admin

_PIECE = 1 << 20


def import_file(address: str, path: str) -> int:
    """Send an archive to the daemon at the unix socket ``address`` and print what it holds.

    Raises InvalidArgumentError where the file cannot be read, CriError with the daemon's words where it
    refuses or does not answer.
    """
    if path == "-":
        return _import(address, sys.stdin.buffer, "on standard input")
    try:
        with open(path, "rb") as f:
            return _import(address, f, path)
    except OSError as e:
        raise InvalidArgumentError(f"{path}: {e.strerror}") from e


def _import(address: str, archive: BinaryIO, name: str) -> int:
    with grpc.insecure_channel(f"unix:{address}") as channel:
        call = channel.stream_unary(
            "/criserver.v1.AdminService/ImportImage",
            request_serializer=admin.ImportImageRequest.SerializeToString,
            response_deserializer=admin.ImportImageResponse.FromString,
        )
        try:
            response: admin.ImportImageResponse = call(_pieces(archive, name))
        except grpc.RpcError as e:
            raise CriError(_words(address, e)) from e
    for image in response.images:
        print(image.id, *image.names)
    return 0


def _pieces(archive: BinaryIO, name: str) -> Iterator[admin.ImportImageRequest]:
    yield admin.ImportImageRequest(name=name)
    while piece := archive.read(_PIECE):
        yield admin.ImportImageRequest(data=piece)


def _words(address: str, error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return f"no daemon answers at {address}; start one with `criserver serve`"
    return str(error.details())
