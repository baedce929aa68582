"""The status of a call that has failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.api.grpc_server import _status, generic_handler, listen
from criserver.errors import CriError, FailedPreconditionError
from criserver.pb.runtime.v1 import api_pb2 as cri


def failed(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (failed(errno.EIO, "/disk/f"), "INTERNAL", "Call: /disk/f: Input/output error: a disk or its file system has"),
        (caused(CriError("no layer"), failed(errno.EROFS, "/d")), "INTERNAL", "Call: no layer (/d: Read-only file"),
        (caused(FailedPreconditionError("no log"), failed(errno.EIO)), "FAILED_PRECONDITION", "Call: no log (Input/"),
        (failed(errno.ENOSPC, "/disk/f"), "RESOURCE_EXHAUSTED", "Call: /disk/f: No space left on device (the disk"),
        (failed(errno.EACCES, "/disk/f"), "INTERNAL", "Call: PermissionError: /disk/f: Permission denied"),
        (CriError("no such luck"), "INTERNAL", "no such luck"),
        (KeyError("x"), "INTERNAL", "Call: KeyError: 'x'"),
    ],
)
def test_an_error_is_told_by_its_code_and_in_words(error: Exception, code: str, text: str) -> None:
    found, message = _status("Call", error)
    assert found is grpc.StatusCode[code]
    assert message.startswith(text)


async def test_messages_have_the_configured_sizes(tmp_path: Path) -> None:
    class Service:
        async def version(self, request: cri.VersionRequest) -> cri.VersionResponse:
            return cri.VersionResponse(runtime_name="x" * int(request.version))

    service = cri.DESCRIPTOR.services_by_name["RuntimeService"]
    missing = dict.fromkeys(service.methods_by_name, "none")
    handlers = [generic_handler(service, Service(), missing)]
    server = await listen(str(tmp_path / "socket"), handlers, max_request=1000, max_answer=2000)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        version: Any = channel.unary_unary(
            "/runtime.v1.RuntimeService/Version",
            request_serializer=cri.VersionRequest.SerializeToString,
            response_deserializer=cri.VersionResponse.FromString,
        )
        assert len((await version(cri.VersionRequest(version="1900"))).runtime_name) == 1900
        for too_large in ("1".zfill(1000), "2000"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await version(cri.VersionRequest(version=too_large))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(0)
