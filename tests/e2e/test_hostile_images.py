"""Hostile layers, pulled by a real daemon: each is refused with a clear error, or harms only its own image.

test_hostile_layers.py has the tricks by themselves, where what each leaves in its layer can be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support import hostile
from tests.support.lyingregistry import Server, server, stored
from tests.support.node import Node, refused

__all__ = ["server"]
NAMES = [name for name, _ in hostile.refused_layers("/canary")]
HARMLESS = [name for name, _ in hostile.accepted_layers("/canary")]


@pytest.fixture(scope="module")
def node(nothing_left: None) -> Iterator[Node]:
    """A daemon that allows little."""
    node = Node(hostile.LIMITS)
    try:
        os.mkdir(f"{node.base}/canary")
        with open(f"{node.base}/canary/file", "w") as file:
            file.write("untouched")
        node.start()
        yield node
    finally:
        node.close()


@pytest.fixture
def unharmed(node: Node) -> Iterator[None]:
    """What is outside of all layers is as it was, and nothing is left on the node."""
    before, blobs = everything_outside(node), stored(node)
    yield
    assert everything_outside(node) == before
    assert stored(node) == blobs
    assert node.process is not None
    assert node.process.poll() is None
    workers = f"/proc/{node.process.pid}/task/{node.process.pid}/children"
    with open(workers) as file:
        assert len(file.read().split()) == 1  # the nursery


def everything_outside(node: Node) -> list[tuple[object, ...]]:
    """Every file in the node's directories but for the layers and the daemon's log, with all that an inode has."""
    found: list[tuple[object, ...]] = [("/", *sorted(os.listdir("/")))]
    for top in (f"{node.base}/canary", f"{node.root}/snapshots/active", f"{node.root}/snapshots/empty"):
        for path, _, names in os.walk(top):
            for name in (".", *names):
                status = os.lstat(f"{path}/{name}")
                attributes = os.listxattr(f"{path}/{name}", follow_symlinks=False)
                found.append((path, name, status[:-3], status.st_mtime_ns, status.st_ctime_ns, *attributes))
    found += [(name,) for directory in (node.base, node.root) for name in sorted(os.listdir(directory))]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_layer_is_refused(node: Node, server: Server, unharmed: None, name: str) -> None:
    case = dict(hostile.refused_layers(f"{node.base}/canary"))[name]
    server.image = hostile.image_of(case.layers)
    with refused(case.code, *case.words):
        node.client.PullImage(image=cri.ImageSpec(image=f"127.0.0.1:{server.server_port}/bad:latest"))


@pytest.mark.parametrize("name", HARMLESS)
def test_a_layer_that_looks_hostile_does_no_harm(node: Node, server: Server, unharmed: None, name: str) -> None:
    server.image = hostile.image_of(dict(hostile.accepted_layers(f"{node.base}/canary"))[name])
    image = cri.ImageSpec(image=f"127.0.0.1:{server.server_port}/odd:latest")
    assert node.client.PullImage(image=image).image_ref == server.image.id
    node.client.RemoveImage(image=image)
