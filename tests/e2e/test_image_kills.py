"""The daemon is killed at random moments of pulls, imports, removals and prunes. Afterwards nothing is left of them.

CRISERVER_KILLS says how many times, CRISERVER_KILL_SEED which moments: both are printed where a test fails.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.cli.client import method
from criserver.images.manifests import chain_ids
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.support.imagebuilder import BuiltImage, build_image, write_archive
from tests.support.node import Node
from tests.support.registry import Registry, registry
from tests.support.waiting import SLOWNESS

__all__ = ["registry"]

KILLS = int(os.environ.get("CRISERVER_KILLS", "12"))
SEED = int(os.environ.get("CRISERVER_KILL_SEED", random.randrange(1 << 32)))
ADMIN = admin.DESCRIPTOR.services_by_name["AdminService"]


@pytest.fixture(scope="module")
def own_node(nothing_left: None) -> Iterator[Node]:
    """A running daemon without any image."""
    node = Node()
    try:
        node.start()
        yield node
    finally:
        node.close()


def files(prefix: str, count: int, size: int) -> dict[str, bytes]:
    """So many files for a layer."""
    return {f"{prefix}/{n % 7}/{n}": os.urandom(size) for n in range(count)}


def ask(node: Node, name: str, request: object = None) -> list[Any]:
    """An RPC of the AdminService; all its answers."""
    empty = {"PruneImages": admin.PruneImagesRequest(), "VerifyImages": admin.VerifyImagesRequest()}
    answer = method(node.client.channel, ADMIN, name)(request or empty[name], timeout=60)
    return list(answer) if ADMIN.methods_by_name[name].server_streaming else [answer]


def send(node: Node, path: str) -> None:
    """Import an archive."""

    def pieces() -> Iterator[admin.ImportImageRequest]:
        with open(path, "rb") as f:
            while data := f.read(64 << 10):
                yield admin.ImportImageRequest(data=data, name="archive")

    method(node.client.channel, ADMIN, "ImportImage")(pieces(), timeout=60)


def on_disk(node: Node) -> tuple[set[str], set[str]]:
    """The digests of the blobs and the chain IDs of the layers that there are files of."""
    blobs = {f"sha256:{name}" for name in os.listdir(f"{node.root}/content/blobs/sha256")}
    layers: set[str] = set()
    for number in os.listdir(f"{node.root}/snapshots/layers"):
        with open(f"{node.root}/snapshots/layers/{number}/meta.json") as f:
            layers.add(json.load(f)["chain_id"])
    return blobs, layers


def needed(images: list[BuiltImage]) -> tuple[set[str], set[str]]:
    """What of these images has to be on disk."""
    layers: set[str] = set()
    for image in images:
        layers.update(chain_ids(json.loads(image.blobs[image.id])["rootfs"]["diff_ids"]))
    return {digest for image in images for digest in image.blobs}, layers


def unfinished(node: Node) -> list[str]:
    """What no process is working on any more."""
    found = [point for point in mounts.mounts_below(node.base) if point != node.root]
    for directory in ("snapshots/staging", "snapshots/active", "content/ingest", "spool"):
        with contextlib.suppress(FileNotFoundError):
            found += [f"{directory}/{name}" for name in os.listdir(f"{node.root}/{directory}")]
    return found


@pytest.mark.timeout((300 + 30 * KILLS) * SLOWNESS)
def test_a_kill_at_any_moment_of_what_images_go_through(own_node: Node, registry: Registry, tmp_path: Path) -> None:
    node = own_node
    base = files("base", 300, 500)
    images = [build_image([base, files(f"middle{n}", 150, 2000), {"top": os.urandom(300_000)}]) for n in range(3)]
    names = [registry.push(image, f"killed{n}:1") for n, image in enumerate(images)]
    write_archive(images[2], str(tmp_path / "archive.tar"), "localhost/archive:1")
    by_id = {image.id: image for image in images}
    pick = random.Random(SEED)
    interrupted = dict.fromkeys(("pull", "import", "remove", "prune"), 0)

    def remove(name: str) -> None:
        node.client.RemoveImage(image=cri.ImageSpec(image=name))

    def work(choose: random.Random, weights: tuple[int, ...]) -> None:
        actions: dict[str, Callable[[], object]] = {
            "pull": lambda: node.client.PullImage(image=cri.ImageSpec(image=choose.choice(names))),
            "import": lambda: send(node, str(tmp_path / "archive.tar")),
            "remove": lambda: remove(choose.choice([*names, "localhost/archive:1"])),
            "prune": lambda: ask(node, "PruneImages", admin.PruneImagesRequest(all=True)),
        }
        action = ""
        # A closed channel is a ValueError.
        with contextlib.suppress(grpc.RpcError, ValueError):
            while True:
                (action,) = choose.choices(list(actions), weights)
                actions[action]()
        interrupted[action] += 1

    for number in range(KILLS):
        # Removals take moments only, so every second time there is nothing else.
        if number % 2:
            weights, moment = (0, 0, 3, 1), pick.uniform(0, 0.06)
            for name in names:
                node.client.PullImage(image=cri.ImageSpec(image=name))
        else:
            weights, moment = (5, 2, 2, 1), pick.uniform(0, 0.7)
        threads = [threading.Thread(target=work, args=(random.Random(pick.random()), weights)) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(moment)
        node.kill()
        for thread in threads:
            thread.join()
        node.start()
        where = f"kill {number} of {KILLS}, after {moment:.3f} s, CRISERVER_KILL_SEED={SEED}"
        assert unfinished(node) == [], where
        here = [by_id[image.id] for image in node.client.ListImages().images]
        assert on_disk(node) == needed(here), where
        *_, verified = ask(node, "VerifyImages")
        assert not [d for answer in ask(node, "VerifyImages") for d in answer.damage], where
        assert (verified.images, verified.blobs, verified.layers) == (len(here), *map(len, needed(here))), where
        again = pick.randrange(len(images))
        assert node.client.PullImage(image=cri.ImageSpec(image=names[again])).image_ref == images[again].id, where
        (pruned,) = ask(node, "PruneImages")
        assert (pruned.freed_bytes, list(pruned.images)) == (0, []), where
        here = [by_id[image.id] for image in node.client.ListImages().images]
        assert images[again] in here
        assert on_disk(node) == needed(here), where
        usage = node.client.ImageFsInfo().image_filesystems[0]
        assert usage.used_bytes.value == allocated(node), where
    print(f"killed {KILLS} times, CRISERVER_KILL_SEED={SEED}, during {interrupted}")
    assert interrupted["pull"] or KILLS < 5
    (pruned,) = ask(node, "PruneImages", admin.PruneImagesRequest(all=True))
    assert on_disk(node) == (set(), set())
    assert node.client.ImageFsInfo().image_filesystems[0].used_bytes.value == 0


def allocated(node: Node) -> int:
    """The bytes that blobs and layers' files have on disk, counted by walking; a block for each directory."""
    total = 0
    for top in (f"{node.root}/content/blobs/sha256", *glob.glob(f"{node.root}/snapshots/layers/*/fs")):
        for directory, directories, names in os.walk(top):
            total += sum(os.lstat(f"{directory}/{name}").st_blocks * 512 for name in names) + 4096 * len(directories)
    return total
