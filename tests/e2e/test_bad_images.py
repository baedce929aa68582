"""Pulls that must fail, by CRI: the gRPC code, the message, and a node that is as before."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support import layers
from tests.support.imagebuilder import BuiltImage, build_image, by_sha512
from tests.support.lyingregistry import IMAGE, Server, server, stored
from tests.support.node import Node, refused

__all__ = ["server"]

LAYER = IMAGE.manifest["layers"][0]["digest"]


@pytest.fixture
def pull(node: Node, server: Server) -> Iterator[Callable[[], object]]:
    """Pull the served image; afterwards nothing of it is on the node."""
    before = stored(node)
    yield lambda: node.client.PullImage(image=cri.ImageSpec(image=f"127.0.0.1:{server.server_port}/bad:latest"))
    assert stored(node) == before
    assert node.settled() == []


def test_the_server_is_sound_where_it_does_not_lie(node: Node, server: Server) -> None:
    name = f"127.0.0.1:{server.server_port}/good:latest"
    assert node.client.PullImage(image=cri.ImageSpec(image=name)).image_ref == IMAGE.id
    node.client.RemoveImage(image=cri.ImageSpec(image=name))


def test_a_wrong_digest(pull: Callable[[], object], server: Server) -> None:
    server.bodies[LAYER] = b"x" * len(IMAGE.blobs[LAYER])
    with refused(grpc.StatusCode.DATA_LOSS, LAYER, f"127.0.0.1:{server.server_port}"):
        pull()


def test_a_wrong_digest_by_sha512(node: Node, server: Server) -> None:
    """Where all that the manifest names is right, and one blob of it is not."""
    server.image = by_sha512(IMAGE)
    for wrong in (server.image.id, server.image.manifest["layers"][0]["digest"], server.image.digest):
        before = stored(node)
        server.bodies = {wrong: b"x" * len(server.image.blobs[wrong])}
        with refused(grpc.StatusCode.DATA_LOSS, wrong, "has digest sha512:"):
            node.client.PullImage(
                image=cri.ImageSpec(image=f"127.0.0.1:{server.server_port}/bad@{server.image.digest}")
            )
        assert stored(node) == before


def test_a_truncated_layer(pull: Callable[[], object], server: Server) -> None:
    server.bodies[LAYER] = IMAGE.blobs[LAYER][:50]
    server.lengths[LAYER] = len(IMAGE.blobs[LAYER])
    with refused(grpc.StatusCode.UNAVAILABLE, LAYER):
        pull()


def test_a_manifest_that_is_not_valid(pull: Callable[[], object], server: Server) -> None:
    server.bodies["latest"] = b'{"schemaVersion": 2, "layers": "none"}'
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "manifest", "bad:latest"):
        pull()


def test_a_configuration_that_is_not_valid(pull: Callable[[], object], server: Server) -> None:
    server.image = with_configuration(b'{"os": "linux", "architecture": "amd64", "rootfs": 1}')
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "configuration", "rootfs"):
        pull()


@pytest.mark.parametrize(
    ("trick", "word"),
    [
        ([layers.item("../../escaped", b"x")], "escaped"),
        ([layers.symlink("way", "way"), layers.item("way/escaped", b"x")], "way/escaped"),
        ([layers.hardlink("passwd", "/../../etc/passwd")], "passwd"),
        ([layers.item("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=1 << 20)], "disk"),
    ],
    ids=["dotdot", "link to itself", "hard link out", "device out of range"],
)
def test_a_layer_that_wants_to_write_outside_its_root(
    pull: Callable[[], object], server: Server, trick: list[tuple[tarfile.TarInfo, bytes]], word: str
) -> None:
    server.image = build_image([layers.archive(*trick)])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, word):
        pull()
    assert not os.path.exists("/etc/escaped")
    assert not os.path.exists("/escaped")


def with_configuration(body: bytes) -> BuiltImage:
    """The image with another configuration, rightly named by its manifest."""
    from tests.support.imagebuilder import add_blob

    blobs = dict(IMAGE.blobs)
    manifest = {**IMAGE.manifest, "config": add_blob(blobs, IMAGE.manifest["config"]["mediaType"], body)}
    top = add_blob(blobs, manifest["mediaType"], json.dumps(manifest).encode())
    return BuiltImage(blobs, top, IMAGE.layers)
