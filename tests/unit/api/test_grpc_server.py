"""The status of a call that has failed."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from criserver import logs
from criserver.api.grpc_server import _status, generic_handler, listen
from criserver.errors import CriError, FailedPreconditionError, NotFoundError
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.telemetry import families


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


async def test_a_server_without_descriptors_is_refused_and_does_not_end_the_process(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 6, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await listen(str(tmp_path / "socket"), [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_stream_ends_in_its_own_context_when_its_client_goes(tmp_path: Path) -> None:
    ended = asyncio.Event()

    class Service:
        async def stream_containers(
            self, _: cri.StreamContainersRequest
        ) -> AsyncIterator[cri.StreamContainersResponse]:
            logs.about(pod="shop/web")
            (call,) = logs.calls_under_way()
            assert (call.rpc, call.about) == ("StreamContainers", {"pod": "shop/web"})
            try:
                while True:  # until the client's window is full
                    yield cri.StreamContainersResponse(containers=[cri.Container(id="x" * 10_000)])
            finally:
                assert call.number == logs.calls_under_way()[0].number
                ended.set()

        async def get_container_events(self, _: Any) -> AsyncIterator[cri.ContainerEventResponse]:
            assert logs.calls_under_way() == []
            yield cri.ContainerEventResponse(container_id="c")
            raise NotFoundError("no more")

    service = cri.DESCRIPTOR.services_by_name["RuntimeService"]
    missing = dict.fromkeys(service.methods_by_name, "none")
    server = await listen(str(tmp_path / "socket"), [generic_handler(service, Service(), missing)])
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        call = stream(channel, "StreamContainers", cri.StreamContainersRequest(), cri.StreamContainersResponse)
        assert len((await call.read()).containers) == 1
        assert not ended.is_set()
        call.cancel()
        async with asyncio.timeout(60):
            await ended.wait()
        events = stream(channel, "GetContainerEvents", cri.GetEventsRequest(), cri.ContainerEventResponse)
        assert (await events.read()).container_id == "c"
        with pytest.raises(grpc.aio.AioRpcError, match="no more") as caught:
            await events.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await server.stop(0)
    assert logs.calls_under_way() == []


def stream(channel: grpc.aio.Channel, rpc: str, request: Any, answer: Any) -> Any:
    path = f"/runtime.v1.RuntimeService/{rpc}"
    serialize, parse = type(request).SerializeToString, answer.FromString
    return channel.unary_stream(path, request_serializer=serialize, response_deserializer=parse)(request)


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


@pytest.mark.parametrize("rpc", ["Version", "GetContainerEvents"])
async def test_an_error_is_counted_before_it_is_sent(rpc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the error and asks for the metrics then finds it there."""
    counted: list[tuple[str, ...]] = []
    sent: list[list[tuple[str, ...]]] = []

    class Service:
        async def version(self, request: cri.VersionRequest) -> cri.VersionResponse:
            raise FailedPreconditionError("not now")

        async def get_container_events(self, request: cri.GetEventsRequest) -> AsyncIterator[cri.VersionResponse]:
            raise FailedPreconditionError("not now")
            yield

    class Context:
        def time_remaining(self) -> None:
            return None

        async def abort(self, code: grpc.StatusCode, words: str) -> None:
            sent.append([*counted])
            raise ConnectionAbortedError(words)

    counter = SimpleNamespace(labels=lambda *values: SimpleNamespace(inc=lambda _: counted.append(values)))
    monkeypatch.setattr(families.RPCS, "_real", counter)
    service = cri.DESCRIPTOR.services_by_name["RuntimeService"]
    handlers = generic_handler(service, Service(), dict.fromkeys(service.methods_by_name, "none"))
    details: Any = SimpleNamespace(method=f"/runtime.v1.RuntimeService/{rpc}")
    handler: Any = handlers.service(details)
    with pytest.raises(ConnectionAbortedError, match="not now"):
        if rpc == "Version":
            await handler.unary_unary(cri.VersionRequest(), Context())
        else:
            await handler.unary_stream(cri.GetEventsRequest(), Context())
    assert sent == [[("RuntimeService", rpc, "FAILED_PRECONDITION")]]
