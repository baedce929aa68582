"""Registries that fail, lie or want to know who asks: a server of the test's own, as no real one can be made to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import encode_basic_auth, web

from criserver.errors import (
    CriError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from criserver.images import Credentials, registry
from tests.e2e.imagebuilder import BuiltImage, add_blob, build_image, build_index, digest
from tests.e2e.rooms import Rooms

Answer = Callable[[web.Request], web.StreamResponse | Awaitable[web.StreamResponse]]


@dataclass
class Server:
    """Serves one image as ``app:1``; ``answers`` has other answers for the last parts of paths."""

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
        wanted = self.image.digest if name == "1" else name
        if wanted not in self.image.blobs:
            return web.Response(status=404)
        kind = str(self.image.descriptor["mediaType"]) if wanted == self.image.digest else "application/octet-stream"
        return web.Response(body=self.image.blobs[wanted], content_type=kind)

    def lie(self, wanted: str, body: bytes) -> None:
        """Answer with another body where ``wanted`` is asked for."""
        self.answers[wanted] = lambda _: web.Response(body=body)

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
        """Serve on a free port of the loopback interface."""
        application = web.Application()
        application.router.add_get("/{path:.*}", self.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
            await site.start()
            self.address = f"127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


@pytest.fixture
def image() -> BuiltImage:
    return build_image([{"a": os.urandom(200_000)}, {"b": b"2"}, {"c": b"3"}], {"Cmd": ["a"]})


@pytest.fixture
async def rooms(tmp_path):
    found = Rooms(str(tmp_path))
    yield found
    found.close()


@pytest.fixture
async def server(image, rooms):
    async with Server(image).running() as found:
        rooms.configure(found.address, f'server = "http://{found.address}"')
        yield found


async def refused(rooms: Rooms, name: str, error: type[CriError], *parts: str, **more: Any) -> None:
    """The pull fails with exactly this class and a message that has all parts, and leaves nothing."""
    with pytest.raises(CriError) as caught:
        await rooms.images.pull(name, **more)
    assert type(caught.value) is error, caught.value
    for part in (name, *parts):
        assert part in str(caught.value)
    assert rooms.leftovers() == []
    assert rooms.images.list() == []


def changed(image: BuiltImage, **changes: Any) -> BuiltImage:
    """The image with another manifest, which has the right digest."""
    blobs = dict(image.blobs)
    top = add_blob(blobs, str(image.descriptor["mediaType"]), json.dumps({**image.manifest, **changes}).encode())
    return BuiltImage(blobs, top)


def with_config(image: BuiltImage, body: bytes) -> BuiltImage:
    """The image with another configuration, which has the right digest."""
    blobs = dict(image.blobs)
    return changed(
        BuiltImage(blobs, image.descriptor), config=add_blob(blobs, image.manifest["config"]["mediaType"], body)
    )


async def test_the_server_itself_is_sound(server, rooms, image):
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id


@pytest.mark.parametrize("number", [0, 2])
async def test_a_layer_of_another_digest(server, rooms, image, number):
    layer = image.manifest["layers"][number]
    body = os.urandom(layer["size"])
    server.lie(layer["digest"], body)
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"blob {layer['digest']}", digest(body))


async def test_a_configuration_of_another_digest(server, rooms, image):
    body = image.blobs[image.id].replace(b"linux", b"linuX")
    server.lie(image.id, body)
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"blob {image.id}", digest(body))


async def test_a_manifest_of_another_digest(server, rooms, image):
    server.lie(image.digest, image.blobs[image.digest] + b" ")
    await refused(rooms, f"{server.address}/app@{image.digest}", DataLossError, "manifest", "has digest")
    body = image.blobs[image.digest]
    stated = digest(b"else")
    server.answers["1"] = lambda _: web.Response(body=body, headers={"Docker-Content-Digest": stated})
    await refused(rooms, f"{server.address}/app:1", DataLossError, image.digest, stated)


@pytest.mark.parametrize("headers", [True, False])
async def test_a_layer_that_ends_early(server, rooms, image, headers):
    layer = image.manifest["layers"][0]
    half = image.blobs[layer["digest"]][:1000]

    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if headers:
            response.content_length = layer["size"]
        await response.prepare(request)
        await response.write(half)
        if headers:
            request.transport.close()
        return response

    server.answers[layer["digest"]] = broken
    part = "the connection ended in the middle" if headers else f"ended after 1000 of {layer['size']} bytes"
    await refused(rooms, f"{server.address}/app:1", UnavailableError, layer["digest"], part)


@pytest.mark.parametrize("what", ["layer", "manifest"])
async def test_a_server_that_stalls(server, rooms, image, what, monkeypatch):
    monkeypatch.setattr(registry, "_PROGRESS_TIMEOUT", 0.3)
    ended = asyncio.Event()

    async def stalled(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{")
        await ended.wait()
        return response

    server.answers["1" if what == "manifest" else image.manifest["layers"][0]["digest"]] = stalled
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "no progress")
    ended.set()


async def test_a_layer_that_is_longer_than_the_manifest_says(server, rooms, image):
    layer = image.manifest["layers"][1]
    server.lie(layer["digest"], image.blobs[layer["digest"]] + bytes(10_000_000))
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"is longer than its {layer['size']} bytes")


async def test_a_manifest_that_lies_about_a_size(server, rooms, image):
    layers = [dict(layer) for layer in image.manifest["layers"]]
    layers[1]["size"] += 1
    server.image = changed(image, layers=layers)
    await refused(rooms, f"{server.address}/app:1", UnavailableError, f"of {layers[1]['size']} bytes")


async def test_a_layer_of_another_diff_id(server, rooms, image):
    config = json.loads(image.blobs[image.id])
    config["rootfs"]["diff_ids"][1] = "sha256:" + "0" * 64
    server.image = with_config(image, json.dumps(config).encode())
    await refused(rooms, f"{server.address}/app:1", DataLossError, image.manifest["layers"][1]["digest"], "0" * 64)


async def test_a_layer_that_is_no_archive(server, rooms, image):
    blobs = dict(image.blobs)
    layers = [*image.manifest["layers"][:2], add_blob(blobs, image.manifest["layers"][0]["mediaType"], b"no gzip")]
    server.image = changed(BuiltImage(blobs, image.descriptor), layers=layers)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, layers[2]["digest"])


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"schemaVersion": 2}', b'{"schemaVersion": 2, "layers": []}']
)
async def test_an_invalid_manifest(server, rooms, body):
    server.lie("1", body)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, f"manifest {digest(body)} is ")


async def test_a_manifest_of_schema_1(server, rooms):
    server.lie("1", b'{"schemaVersion": 1, "fsLayers": []}')
    await refused(rooms, f"{server.address}/app:1", UnimplementedError, "schema 1", "build or push")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"os": "linux", "architecture": "amd64", "rootfs": 1}'])
async def test_an_invalid_configuration(server, rooms, image, body):
    server.image = with_config(image, body)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, f"configuration {digest(body)} is ")


async def test_another_number_of_layers(server, rooms, image):
    server.image = changed(image, layers=image.manifest["layers"][:2])
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "has 2 layers, and its configuration 3")


async def test_an_oversized_configuration(server, rooms, image):
    server.image = changed(image, config={**image.manifest["config"], "size": 9 << 20})
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "has 9437184 bytes; 8388608")


async def test_an_oversized_manifest(server, rooms):
    server.lie("1", b" " * (4 << 20) + b"{}")
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "manifest 1 is larger than 4194304 bytes")


async def test_indexes_without_end(server, rooms, image):
    index = build_index([image])
    for _ in range(4):
        index = build_index([index])
    server.image = index
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "nested")


@pytest.mark.parametrize("which", ["layer", "config"])
async def test_a_missing_blob(server, rooms, image, which):
    gone = image.id if which == "config" else image.manifest["layers"][1]["digest"]
    server.answers[gone] = lambda _: web.Response(status=404)
    await refused(rooms, f"{server.address}/app:1", NotFoundError, gone, server.address, "404")


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFoundError), (403, PermissionDeniedError), (401, UnauthenticatedError), (500, UnavailableError),
     (503, UnavailableError), (429, UnavailableError), (204, UnavailableError)],
)  # fmt: skip
async def test_refusals_of_the_manifest(server, rooms, status, error):
    server.answers["1"] = lambda _: web.Response(status=status)
    await refused(rooms, f"{server.address}/app:1", error, f"http://{server.address}", f"manifests/1: {status}")


async def test_a_registry_that_wants_a_token(server, rooms):
    header = {"WWW-Authenticate": 'Bearer realm="https://auth.example/token"'}
    server.answers["1"] = lambda _: web.Response(status=401, headers=header)
    await refused(rooms, f"{server.address}/app:1", UnauthenticatedError, "bearer token")


async def test_nobody_there(rooms):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        await refused(
            rooms, f"{address}/app:1", UnavailableError, f"https://{address}", f"http://{address}", "cannot connect"
        )


async def test_an_unknown_host(rooms):
    await refused(
        rooms, "no-such-host.invalid/app:1", UnavailableError, "https://no-such-host.invalid", "cannot connect"
    )


async def test_an_invalid_reference_asks_nobody(server, rooms):
    with pytest.raises(InvalidArgumentError):
        await rooms.images.pull(f"{server.address}/App")
    assert server.requests == []


async def test_a_malformed_hosts_toml(rooms):
    rooms.configure("r.example", "server = 1")
    with pytest.raises(FailedPreconditionError, match=r"r\.example/hosts\.toml: key server"):
        await rooms.images.pull("r.example/app:1")


async def test_a_mirror_that_fails_is_passed_over(server, rooms, image):
    layer = image.manifest["layers"][0]["digest"]
    async with Server(image).running() as mirror:
        mirror.lie(layer, b"else")
        rooms.configure(
            "r.example",
            f'server = "http://{server.address}"\n[host."http://127.0.0.1:1"]\n[host."http://{mirror.address}"]\n'
            '[host."http://127.0.0.1:2"]\ncapabilities = ["pull"]\n',
        )
        found = await rooms.images.pull("r.example/app:1")
        assert found.repo_tags == ("r.example/app:1",)
        assert [request.path for request in server.requests] == [f"/v2/app/blobs/{layer}"]
        assert {request.query["ns"] for request in mirror.requests} == {"r.example"}


async def test_a_mirror_without_resolve_is_not_asked_what_a_tag_means(server, rooms, image):
    async with Server(image).running() as mirror:
        text = f'server = "http://{server.address}"\n[host."http://{mirror.address}"]\ncapabilities = ["pull"]'
        rooms.configure("r.example", text)
        await rooms.images.pull("r.example/app:1")
        assert [request.path for request in server.requests] == ["/v2/app/manifests/1"]
        assert len(mirror.requests) == len(image.blobs) - 1


async def test_every_host_is_told_where_all_fail(server, rooms):
    server.answers["1"] = lambda _: web.Response(status=404)
    rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://127.0.0.1:1"]')
    await refused(rooms, "r.example/app:1", NotFoundError, "http://127.0.0.1:1: cannot connect", "404")


async def test_basic_authentication(server, rooms, image):
    server.password = "secret"
    name = f"{server.address}/app:1"
    await refused(rooms, name, UnauthenticatedError, "401", "check the pull secret")
    await refused(rooms, name, UnauthenticatedError, "401", credentials=Credentials("me", "wrong"))
    elsewhere = Credentials("me", "secret", server_address="https://other.example")
    await refused(rooms, name, UnauthenticatedError, "401", credentials=elsewhere)
    here = Credentials("me", "secret", server_address=f"http://{server.address}")
    assert (await rooms.images.pull(name, here)).id == image.id
    assert "secret" not in repr(here)


async def test_a_pull_without_credentials_does_not_join_one_with(server, rooms):
    server.password = "secret"
    name = f"{server.address}/app:1"
    good, bad = await asyncio.gather(
        rooms.images.pull(name, Credentials("me", "secret")), rooms.images.pull(name), return_exceptions=True
    )
    assert good.repo_tags == (name,)
    assert isinstance(bad, UnauthenticatedError)


async def test_credentials_go_to_no_mirror(server, rooms, image):
    async with Server(image, password="secret").running() as mirror:
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        await rooms.images.pull("r.example/app:1", Credentials("me", "secret"))
        assert mirror.requests
        assert all("Authorization" not in request.headers for request in mirror.requests)


async def test_redirects_carry_nothing_that_identifies_us(server, rooms, image):
    server.password = "secret"
    layer = image.manifest["layers"][0]["digest"]
    async with Server(image).running() as storage:
        target = f"http://{storage.address}/signed/{layer}?sig=a%2Fb"
        server.answers[layer] = lambda _: web.Response(status=307, headers={"Location": target})
        text = f'server = "http://{server.address}"\n[header]\nX-Node = "us"'
        rooms.configure(server.address, text)
        await rooms.images.pull(f"{server.address}/app:1", Credentials("me", "secret"))
        (request,) = storage.requests
        assert request.raw_path == f"/signed/{layer}?sig=a%2Fb"
        assert "Authorization" not in request.headers
        assert "X-Node" not in request.headers
        assert {r.headers["X-Node"] for r in server.requests} == {"us"}


@pytest.mark.parametrize("location", ["/v2/app/manifests/1", "", "file:///etc/passwd", "http://[::", None])
async def test_redirects_that_lead_nowhere(server, rooms, location):
    headers = {} if location is None else {"Location": location}
    server.answers["1"] = lambda _: web.Response(status=302, headers=headers)
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "manifests/1")
    assert len(server.requests) <= 10


def make_certificate(directory: str) -> tuple[str, str]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    cert, key = os.path.join(directory, "cert.pem"), os.path.join(directory, "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture
async def secure(image, tmp_path):
    """A server with TLS that wants a client certificate."""
    cert, key = make_certificate(str(tmp_path))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    tls.load_verify_locations(cert)
    tls.verify_mode = ssl.CERT_REQUIRED
    async with Server(image).running(tls) as found:
        yield found


async def test_tls_with_own_authority_and_client_certificate(secure, rooms, image, tmp_path):
    own = f'server = "https://{secure.address}"\n'
    client = f'client = [["{tmp_path}/cert.pem", "{tmp_path}/key.pem"]]\n'
    rooms.configure("r.example", own + client)
    await refused(rooms, "r.example/app:1", UnavailableError, "cannot connect", "certificate verify failed")
    rooms.configure("r.example", own + f'ca = "{tmp_path}/cert.pem"\n')
    await refused(rooms, "r.example/app:1", UnavailableError)
    rooms.configure("r.example", own + client + 'ca = "nothing.pem"\n')
    await refused(rooms, "r.example/app:1", FailedPreconditionError, f"{rooms.certs}/r.example/nothing.pem")
    for trust in (f'ca = "{tmp_path}/cert.pem"\n', "skip_verify = true\n"):
        rooms.configure("r.example", own + client + trust)
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
