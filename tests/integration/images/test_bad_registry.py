"""Registries that send wrong content, and registries that refuse."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from criserver.errors import (
    CriError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    SignatureError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from criserver.images import registry_errors
from criserver.images.manifests import Descriptor
from criserver.images.references import Reference
from tests.support.imagebuilder import BuiltImage, add_blob, build_index, digest
from tests.support.ownregistry import Answer, Server, image, refused, rooms, server
from tests.support.rooms import Rooms

__all__ = ["image", "rooms", "server"]


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


async def test_the_server_itself_is_sound(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id


@pytest.mark.parametrize("number", [0, 2])
async def test_a_layer_of_another_digest(server: Server, rooms: Rooms, image: BuiltImage, number: int) -> None:
    layer = image.manifest["layers"][number]
    body = os.urandom(layer["size"])
    server.lie(layer["digest"], body)
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"blob {layer['digest']}", digest(body))


async def test_a_configuration_of_another_digest(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    body = image.blobs[image.id].replace(b"linux", b"linuX")
    server.lie(image.id, body)
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"blob {image.id}", digest(body))


async def test_a_manifest_of_another_digest(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.lie(image.digest, image.blobs[image.digest] + b" ")
    await refused(rooms, f"{server.address}/app@{image.digest}", DataLossError, "manifest", "has digest")
    body = image.blobs[image.digest]
    stated = digest(b"else")
    server.answers["1"] = lambda _: web.Response(body=body, headers={"Docker-Content-Digest": stated})
    await refused(rooms, f"{server.address}/app:1", DataLossError, image.digest, stated)


async def test_a_layer_that_is_longer_than_the_manifest_says(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    layer = image.manifest["layers"][1]
    server.lie(layer["digest"], image.blobs[layer["digest"]] + bytes(10_000_000))
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"is longer than its {layer['size']} bytes")


async def test_a_manifest_that_lies_about_a_size(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    layers = [dict(layer) for layer in image.manifest["layers"]]
    layers[1]["size"] += 1
    server.image = changed(image, layers=layers)
    await refused(rooms, f"{server.address}/app:1", UnavailableError, f"of {layers[1]['size']} bytes")


async def test_a_layer_of_another_diff_id(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    config = json.loads(image.blobs[image.id])
    config["rootfs"]["diff_ids"][1] = "sha256:" + "0" * 64
    server.image = with_config(image, json.dumps(config).encode())
    await refused(rooms, f"{server.address}/app:1", DataLossError, image.manifest["layers"][1]["digest"], "0" * 64)


async def test_a_layer_that_is_no_archive(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    blobs = dict(image.blobs)
    layers = [*image.manifest["layers"][:2], add_blob(blobs, image.manifest["layers"][0]["mediaType"], b"no gzip")]
    server.image = changed(BuiltImage(blobs, image.descriptor), layers=layers)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, layers[2]["digest"])


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"schemaVersion": 2}', b'{"schemaVersion": 2, "layers": []}']
)
async def test_an_invalid_manifest(server: Server, rooms: Rooms, body: bytes) -> None:
    server.lie("1", body)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, f"manifest {digest(body)} is ")


async def test_a_manifest_of_schema_1(server: Server, rooms: Rooms) -> None:
    server.lie("1", b'{"schemaVersion": 1, "fsLayers": []}')
    await refused(rooms, f"{server.address}/app:1", UnimplementedError, "schema 1", "build or push")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"os": "linux", "architecture": "amd64", "rootfs": 1}'])
async def test_an_invalid_configuration(server: Server, rooms: Rooms, image: BuiltImage, body: bytes) -> None:
    server.image = with_config(image, body)
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, f"configuration {digest(body)} is ")


async def test_another_number_of_layers(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.image = changed(image, layers=image.manifest["layers"][:2])
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "has 2 layers, and its configuration 3")


async def test_an_oversized_configuration(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.image = changed(image, config={**image.manifest["config"], "size": 9 << 20})
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "has 9437184 bytes; 8388608")


async def test_an_oversized_manifest(server: Server, rooms: Rooms) -> None:
    server.lie("1", b" " * (4 << 20) + b"{}")
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "manifest 1 is larger than 4194304 bytes")


async def test_indexes_without_end(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    index = build_index([image])
    for _ in range(4):
        index = build_index([index])
    server.image = index
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, "nested")


@pytest.mark.parametrize("which", ["layer", "config"])
async def test_a_missing_blob(server: Server, rooms: Rooms, image: BuiltImage, which: str) -> None:
    gone = image.id if which == "config" else image.manifest["layers"][1]["digest"]
    server.answers[gone] = lambda _: web.Response(status=404)
    await refused(rooms, f"{server.address}/app:1", NotFoundError, gone, server.address, "404")


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFoundError), (403, PermissionDeniedError), (401, UnauthenticatedError), (500, UnavailableError),
     (503, UnavailableError), (429, UnavailableError), (204, UnavailableError)],
)  # fmt: skip
async def test_refusals_of_the_manifest(server: Server, rooms: Rooms, status: int, error: type[CriError]) -> None:
    server.answers["1"] = lambda _: web.Response(status=status)
    await refused(rooms, f"{server.address}/app:1", error, f"http://{server.address}", f"manifests/1: {status}")


def told(*errors: object) -> bytes:
    return json.dumps({"errors": errors}).encode()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("too many requests\n", "403 Forbidden (too many requests); the"),
        (
            told({"code": "TOOMANYREQUESTS", "message": "the limit\n is 100"}, {}),
            "(TOOMANYREQUESTS: the limit\\n is 100)",
        ),
        (told({"code": "DENIED"}), "403 Forbidden (DENIED); the"),
        (told({"message": "x" * 500}), f"({'x' * 200}…); the"),
        *(
            (body, "403 Forbidden; the")
            for body in (told(), told(7), told({"code": 7}), b"[]", b"<html>", b"[" * 9000, b" " * 20_000)
        ),
    ],
)
async def test_what_the_registry_says_of_a_refusal_is_told(
    server: Server, rooms: Rooms, body: bytes | str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_errors, "_BODY_TIMEOUT", 60.0)
    server.answers["1"] = lambda _: web.Response(status=403, body=body)  # a str is sent as text/plain
    await refused(rooms, f"{server.address}/app:1", PermissionDeniedError, words)


async def test_a_refusal_whose_body_does_not_come_is_told_without_it(
    server: Server, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=403, headers={"Content-Length": "100"})
        await response.prepare(request)
        await ended.wait()
        return response

    ended = asyncio.Event()
    monkeypatch.setattr(registry_errors, "_BODY_TIMEOUT", 0.01)
    server.answers["1"] = stuck
    await refused(rooms, f"{server.address}/app:1", PermissionDeniedError, "403 Forbidden; the")
    ended.set()


async def test_nobody_there(rooms: Rooms) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        await refused(rooms, f"{address}/app:1", UnavailableError, f"https://{address}: cannot connect")


async def test_an_unknown_host(rooms: Rooms) -> None:
    await refused(
        rooms, "no-such-host.invalid/app:1", UnavailableError, "https://no-such-host.invalid", "cannot connect"
    )


async def test_an_invalid_reference_asks_nobody(server: Server, rooms: Rooms) -> None:
    with pytest.raises(InvalidArgumentError):
        await rooms.images.pull(f"{server.address}/App")
    assert server.requests == []


async def test_a_malformed_hosts_toml(rooms: Rooms) -> None:
    rooms.configure("r.example", "server = 1")
    with pytest.raises(FailedPreconditionError, match=r"r\.example/hosts\.toml: key server"):
        await rooms.images.pull("r.example/app:1")


async def test_a_mirror_that_fails_is_passed_over(server: Server, rooms: Rooms, image: BuiltImage) -> None:
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
        assert {request.path for request in server.requests} == {f"/v2/app/blobs/{layer}"}
        assert {request.query["ns"] for request in mirror.requests} == {"r.example"}


async def test_a_mirror_without_resolve_is_not_asked_what_a_tag_means(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    async with Server(image).running() as mirror:
        text = f'server = "http://{server.address}"\n[host."http://{mirror.address}"]\ncapabilities = ["pull"]'
        rooms.configure("r.example", text)
        await rooms.images.pull("r.example/app:1")
        assert [request.path for request in server.requests] == ["/v2/app/manifests/1"]
        assert len(mirror.requests) == len(image.blobs) - 1


def answering(status: int) -> Answer:
    return lambda _: web.Response(status=status)


@pytest.mark.parametrize(
    ("registry", "error", "told"),
    [
        (404, NotFoundError, "manifests/1: 404 Not Found"),
        (403, PermissionDeniedError, "manifests/1: 403 Forbidden; the credentials do not allow to pull it"),
        (400, UnavailableError, "manifests/1: 400 Bad Request"),
    ],
)
async def test_the_registrys_own_answer_is_told_first_where_all_hosts_fail(
    server: Server, rooms: Rooms, image: BuiltImage, registry: int, error: type[CriError], told: str
) -> None:
    server.answers["1"] = answering(registry)
    async with Server(image).running() as mirror:
        mirror.answers["1"] = answering(404)
        hosts = '[host."http://127.0.0.1:1"]\n'
        rooms.configure("r.example", f'server = "http://{server.address}"\n{hosts}[host."http://{mirror.address}"]')
        own, other = f"http://{server.address}: {told}", f"http://{mirror.address}: manifests/1: 404 Not Found"
        words = "; and ".join((own, other, "http://127.0.0.1:1: cannot connect: Connection refused"))
        await refused(rooms, "r.example/app:1", error, f"image r.example/app:1: {words}")


async def test_a_mirrors_answer_is_told_before_a_registry_that_cannot_be_reached(
    rooms: Rooms, image: BuiltImage
) -> None:
    async with Server(image).running() as mirror:
        mirror.answers["1"] = answering(404)
        hosts = f'[host."http://127.0.0.1:1"]\n[host."http://{mirror.address}"]'
        rooms.configure("r.example", f'server = "http://127.0.0.1:2"\n{hosts}')
        told = f"image r.example/app:1: http://{mirror.address}: manifests/1: 404 Not Found; and http://127.0.0.1:2: "
        # It is not NotFoundError: only the registry knows whether there is such an image.
        await refused(rooms, "r.example/app:1", UnavailableError, told, "; and http://127.0.0.1:1: cannot connect")


async def test_an_address_that_has_no_tls_is_told_once(server: Server, rooms: Rooms) -> None:
    server.answers["1"] = answering(404)
    rooms.configure("r.example", f'server = "http://{server.address}"\nskip_verify = true')
    with pytest.raises(NotFoundError) as caught:
        await rooms.images.pull("r.example/app:1")
    assert str(caught.value) == f"image r.example/app:1: http://{server.address}: manifests/1: 404 Not Found"


@pytest.mark.parametrize("location", ["/v2/app/manifests/1", "", "file:///etc/passwd", "http://[::", None])
async def test_redirects_that_lead_nowhere(server: Server, rooms: Rooms, location: str | None) -> None:
    headers = {} if location is None else {"Location": location}
    server.answers["1"] = lambda _: web.Response(status=302, headers=headers)
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "manifests/1")
    assert len(server.requests) <= 11


async def test_a_policy_refuses_an_image_before_it_is_downloaded(
    server: Server, image: BuiltImage, tmp_path: Path
) -> None:
    asked = []

    class Unsigned:
        async def check(self, reference: Reference, target: Descriptor) -> None:
            asked.append((str(reference), target.digest))
            raise SignatureError(f"image {reference} is not signed")

    rooms = Rooms(str(tmp_path / "strict"), policy=Unsigned())
    rooms.configure(server.address, f'server = "http://{server.address}"')
    name = f"{server.address}/app:1"
    with pytest.raises(SignatureError, match=r"^SignatureValidationFailed: image"):
        await rooms.images.pull(name)
    assert SignatureError.code == "UNKNOWN"  # with any other, the word is not at the beginning for a kubelet
    assert asked == [(name, image.digest)]
    assert [request.path for request in server.requests] == ["/v2/app/manifests/1"]
    rooms.close()


async def test_a_registry_that_knows_no_head_is_asked_for_the_manifest(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    name = f"{server.address}/app:1"
    await rooms.images.pull(name)
    for headers in (None, {}, {"Docker-Content-Digest": "nonsense"}, {"Docker-Content-Digest": digest(b"another")}):

        def answer(request: web.Request, headers: dict[str, str] | None = headers) -> web.Response:
            if request.method != "HEAD":
                return server.serve(request)
            return web.Response(status=405) if headers is None else web.Response(headers=headers)

        server.answers["1"] = answer
        del server.requests[:]
        assert (await rooms.images.pull(name)).id == image.id
        assert [request.method for request in server.requests] == ["HEAD", "GET"]


async def test_a_tag_that_is_gone_is_not_found_though_the_image_is_here(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    name = f"{server.address}/app:1"
    await rooms.images.pull(name)
    server.answers["1"] = lambda _: web.Response(status=404)
    with pytest.raises(NotFoundError, match="404"):
        await rooms.images.pull(name)
    assert rooms.images.get(name).id == image.id
