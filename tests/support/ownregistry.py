"""A registry that does what no real one can be made to do: fail, lie, send slowly, ask for credentials."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import encode_basic_auth, web

from criserver.errors import CriError
from criserver.images import RegistrySettings, retries
from tests.support.imagebuilder import BuiltImage, build_image
from tests.support.rooms import Rooms

Answer = Callable[[web.Request], web.StreamResponse | Awaitable[web.StreamResponse]]


@pytest.fixture
def image() -> BuiltImage:
    """An image of three layers, the first of which takes several reads."""
    return build_image([{"a": os.urandom(200_000)}, {"b": b"2"}, {"c": b"3"}], {"Cmd": ["a"]})


@pytest.fixture
async def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rooms]:
    """Rooms that wait a moment only between attempts, and know no proxies."""
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.001)
    found = Rooms(str(tmp_path), settings=RegistrySettings(progress_timeout=60))
    yield found
    found.close()


@pytest.fixture
async def server(image: BuiltImage, rooms: Rooms) -> AsyncIterator[Server]:
    """A registry of ``image`` that ``rooms`` asks over plain HTTP."""
    async with Server(image).running() as found:
        rooms.configure(found.address, f'server = "http://{found.address}"')
        yield found


@dataclass
class Server:
    """Serves one image as ``app:1``; ``answers`` has other answers for the last parts of paths.

    With a ``password`` it wants that of the user "me". ``requests`` are all that came.
    """

    image: BuiltImage
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)
    password: str = ""
    address: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.password and request.headers.get("Authorization") != encode_basic_auth("me", self.password):
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})
        name = request.path.rpartition("/")[2]
        if name in self.answers:
            answer = self.answers[name](request)
            return answer if isinstance(answer, web.StreamResponse) else await answer
        return self.serve(request)

    def serve(self, request: web.Request) -> web.Response:
        """What was asked for, or the part of it."""
        name = request.path.rpartition("/")[2]
        wanted = self.image.digest if name == "1" else name
        if wanted not in self.image.blobs:
            return web.Response(status=404)
        kind = str(self.image.descriptor["mediaType"]) if wanted == self.image.digest else "application/octet-stream"
        body = self.image.blobs[wanted]
        if "Range" not in request.headers:
            return web.Response(body=body, content_type=kind)
        start = offset(request)
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        return web.Response(status=206, body=body[start:], headers=headers, content_type=kind)

    def lie(self, wanted: str, body: bytes) -> None:
        """Answer with another body where ``wanted`` is asked for."""
        self.answers[wanted] = lambda _: web.Response(body=body)

    def asked(self, name: str) -> list[web.Request]:
        """The requests for the manifest or blob ``name``."""
        return [request for request in self.requests if request.path.endswith(f"/{name}")]

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Server]:
        """Serve on a free port of the loopback interface."""
        async with serving(self.handle, tls, port) as self.address:
            yield self


@contextlib.asynccontextmanager
async def serving(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]], tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[str]:
    """An HTTP server on a free port of the loopback interface, by its address."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def offset(request: web.Request) -> int:
    """Where the part begins that a request asks for."""
    return int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


async def refused(rooms: Rooms, name: str, error: type[CriError], *parts: str, **more: Any) -> None:
    """The pull fails with exactly this class and a message that has all parts, and leaves nothing."""
    with pytest.raises(CriError) as caught:
        await rooms.images.pull(name, **more)
    assert type(caught.value) is error, caught.value
    for part in (name, *parts):
        assert part in str(caught.value)
    assert rooms.leftovers() == []
    assert rooms.images.list() == []
