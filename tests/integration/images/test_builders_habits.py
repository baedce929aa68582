"""Images that other runtimes take although the documents of their builders say less, or something else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from criserver.errors import InvalidArgumentError, NotFoundError
from criserver.images import Image, Platform, host_platform
from criserver.images.manifests import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from tests.support.imagebuilder import BuiltImage, add_blob, build_image, build_index
from tests.support.ownregistry import Server, image, rooms, server
from tests.support.rooms import Rooms

__all__ = ["image", "rooms", "server"]

FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
OTHER = Platform("linux", "s390x")
HERE = {"os": "linux", "architecture": host_platform().architecture}


def rebuilt(built: BuiltImage, config: dict[str, Any] | None = None, **manifest: Any) -> BuiltImage:
    """The image with other fields in its configuration and its manifest."""
    blobs = {digest: blob for digest, blob in built.blobs.items() if digest not in (built.digest, built.id)}
    document = {**json.loads(built.blobs[built.id]), **(config or {})}
    described = add_blob(blobs, built.manifest["config"]["mediaType"], json.dumps(document).encode())
    body = json.dumps({**built.manifest, "config": described, **manifest}).encode()
    return replace(built, blobs=blobs, descriptor={**built.descriptor, **add_blob(blobs, OCI_MANIFEST, body)})


def indexed(built: BuiltImage, platform: dict[str, Any] | None) -> BuiltImage:
    """An index of the image alone, as one for ``platform``."""
    return build_index([replace(built, descriptor={**built.descriptor, "platform": platform})])


async def is_stored_and_exported_whole(rooms: Rooms, name: str, found: Image, archive: Path) -> None:
    """A pulled image is known after a restart. It is the same when it is exported, removed and imported."""
    again = Rooms(rooms.root)
    assert again.images.list() == [found]
    again.close()
    archive.write_bytes(b"".join([piece async for piece in rooms.images.export([name])]))
    await rooms.images.remove(name)
    assert not [left for left in rooms.leftovers() if left != archive.name]
    assert await rooms.images.import_archive(str(archive)) == [found]


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
async def test_a_compressed_layer_that_its_type_calls_plain(
    server: Server, rooms: Rooms, tmp_path: Path, packed: str
) -> None:
    built = build_image([{"a": b"1"}], compression=packed)
    (layer,) = built.manifest["layers"]
    server.image = rebuilt(built, layers=[{**layer, "mediaType": OCI_LAYER}])
    name = f"{server.address}/app:1"
    found = await rooms.images.pull(name)
    assert rooms.read(found, "a") == b"1"
    assert [verified.damage async for verified in rooms.images.verify() if verified.damage] == []
    await is_stored_and_exported_whole(rooms, name, found, tmp_path / "archive.tar")


@pytest.mark.parametrize("platform", [HERE, {"architecture": host_platform().architecture.upper()}])
async def test_what_the_index_says_wins(server: Server, rooms: Rooms, platform: dict[str, str]) -> None:
    built = build_image([{"a": b"1"}], platform=OTHER)
    server.image = indexed(built, platform)
    found = await rooms.images.pull(f"{server.address}/app:1")
    assert found.id == built.id
    again = Rooms(rooms.root)
    again.images._suspects.layers.add(found.chain_id)  # as after a power cut
    await again.images.checked(found)
    assert again.images.get(found.id) == found
    again.close()


@pytest.mark.parametrize("platform", [None, {}, {"os": "linux"}, {"os": "linux", "architecture": ""}])
async def test_an_index_that_says_nothing_leaves_it_to_the_configuration(
    server: Server, rooms: Rooms, platform: dict[str, str] | None
) -> None:
    server.image = indexed(build_image([{"a": b"1"}], platform=OTHER), platform)
    with pytest.raises(NotFoundError, match="is for linux/s390x"):
        await rooms.images.pull(f"{server.address}/app:1")
    built = build_image([{"a": b"1"}])
    server.image = indexed(built, platform)
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == built.id


@pytest.mark.parametrize(
    "config",
    [
        {"os": None, "architecture": None, "variant": None},
        {"os": "", "architecture": ""},
        {"variant": "sse4"},
        {"rootfs": None},
    ],
)
async def test_a_configuration_that_says_little(server: Server, rooms: Rooms, config: dict[str, Any]) -> None:
    if "rootfs" in config:
        server.image = rebuilt(build_image([]), config, layers=None)
    else:
        server.image = rebuilt(build_image([{"a": b"1"}]), config, schemaVersion=None, mediaType=None)
    found = await rooms.images.pull(f"{server.address}/app:1")
    assert found.id == server.image.id


@pytest.mark.parametrize("sent", [OCI_MANIFEST, DOCKER_MANIFEST, "text/html; charset=utf-8", OCI_MANIFEST.upper()])
@pytest.mark.parametrize("docker", [False, True])
async def test_a_manifest_that_came_in_the_other_dialect(server: Server, rooms: Rooms, docker: bool, sent: str) -> None:
    server.image = build_image([{"a": b"1"}], docker=docker)
    body = server.image.blobs[server.image.digest]
    server.answers["1"] = lambda _: web.Response(body=body, headers={"Content-Type": sent})
    found = await rooms.images.pull(f"{server.address}/app:1")
    assert found.id == server.image.id
    exported = b"".join([piece async for piece in rooms.images.export([found.id])])
    Path(rooms.root, "a.tar").write_bytes(exported)
    await rooms.images.remove(found.id)
    assert [i.id for i in await rooms.images.import_archive(f"{rooms.root}/a.tar")] == [found.id]


async def test_an_index_of_entries_in_the_other_dialect(server: Server, rooms: Rooms) -> None:
    built = build_image([{"a": b"1"}], docker=True)
    other = replace(built, descriptor={**built.descriptor, "mediaType": OCI_MANIFEST})
    server.image = build_index([other], docker=True)
    body = server.image.blobs[server.image.digest]
    server.answers["1"] = lambda _: web.Response(body=body, headers={"Content-Type": OCI_INDEX})
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == built.id


@pytest.mark.parametrize("sent", [OCI_INDEX, DOCKER_LIST])
async def test_a_manifest_is_no_index(server: Server, rooms: Rooms, image: BuiltImage, sent: str) -> None:
    body = image.blobs[image.digest]
    server.answers["1"] = lambda _: web.Response(body=body, headers={"Content-Type": sent})
    with pytest.raises(InvalidArgumentError, match="came as"):
        await rooms.images.pull(f"{server.address}/app:1")


async def test_a_foreign_layer_that_the_registry_has(server: Server, rooms: Rooms) -> None:
    built = build_image([{"a": b"1"}, {"b": b"2"}])
    base, top = built.manifest["layers"]
    server.image = rebuilt(built, layers=[{**base, "mediaType": FOREIGN, "urls": ["http://127.0.0.1:1/"]}, top])
    found = await rooms.images.pull(f"{server.address}/app:1")
    assert rooms.read(found, "a") == b"1"
    await rooms.images.remove(found.id)
    server.answers[base["digest"]] = lambda _: web.Response(status=404)
    with pytest.raises(NotFoundError, match=f"{base['digest']}.*it is a foreign layer"):
        await rooms.images.pull(f"{server.address}/app:1")
    assert rooms.leftovers() == []


async def test_a_blob_beside_the_layers_of_files(server: Server, rooms: Rooms, tmp_path: Path) -> None:
    """It is kept for exports, as the manifest names it."""
    built = build_image([{"a": b"1"}])
    blobs = dict(built.blobs)
    beside = add_blob(blobs, "application/vnd.example", b"something else")
    server.image = rebuilt(replace(built, blobs=blobs), layers=[beside, *built.manifest["layers"]])
    name = f"{server.address}/app:1"
    found = await rooms.images.pull(name)
    assert rooms.read(found, "a") == b"1"
    await is_stored_and_exported_whole(rooms, name, found, tmp_path / "a.tar")
    await rooms.images.remove(name)
    server.answers[beside["digest"]] = lambda _: web.Response(status=404)
    with pytest.raises(NotFoundError, match=beside["digest"]):
        await rooms.images.pull(name)


@pytest.fixture
async def empty(server: Server, rooms: Rooms) -> AsyncIterator[str]:
    """The name of an image without layers that was pulled."""
    server.image = build_image([], {"Labels": {"a": "b"}})
    assert server.image.manifest["layers"] == []
    yield f"{server.address}/app:1"


async def test_an_image_without_layers(server: Server, rooms: Rooms, empty: str, tmp_path: Path) -> None:
    found = await rooms.images.pull(empty)
    assert (found.id, rooms.images.configuration(found)["config"]["Labels"]) == (server.image.id, {"a": "b"})
    assert found.size == server.image.manifest["config"]["size"]
    await rooms.snapshotter.prepare("key", found.chain_id)
    (tmp_path / "root").mkdir()
    for mount in (rooms.snapshotter.mount("key", str(tmp_path / "root")), None):
        await (mount or rooms.snapshotter.mount_layer(found.chain_id, str(tmp_path / "root")))
        assert list((tmp_path / "root").iterdir()) == []
        await rooms.snapshotter.unmount(str(tmp_path / "root"))
    await rooms.snapshotter.remove("key")
    assert [damage async for verified in rooms.images.verify() for damage in verified.damage] == []
    await is_stored_and_exported_whole(rooms, empty, found, tmp_path / "a.tar")


async def test_an_image_without_layers_is_mended_after_an_unclean_boot(rooms: Rooms, empty: str) -> None:
    found = await rooms.images.pull(empty)
    chain_id = found.chain_id
    await rooms.content.delete(chain_id)
    rooms.images._suspects.layers.add(chain_id)
    await rooms.images.checked(found)
    assert rooms.content.size(chain_id) == 1024


async def test_two_images_share_the_layer_of_images_without_one(server: Server, rooms: Rooms, empty: str) -> None:
    first = await rooms.images.pull(empty)
    server.image = build_image([], {"Labels": {"a": "c"}})
    second = await rooms.images.pull(f"{server.address}/app:1")
    assert second.chain_id == first.chain_id
    await rooms.images.remove(first.id)
    assert rooms.snapshotter.layer(second.chain_id) is not None
