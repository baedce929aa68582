"""A power cut of a node: images that have lost content, writable layers, and records."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.support.fixtures import import_image
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import Node, processes, refused
from tests.support.powercut import RIGHT_SIZES, Disk
from tests.support.registry import Registry, registry
from tests.support.waiting import eventually

__all__ = ["registry"]

NAME = "localhost/data:1"
DATA = os.urandom(200_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
# What the kernel has written by the time of the cut: all but the content of the image's second layer.
WRITTEN = ("criserver.db*", "snapshots/*/*/meta.json", "snapshots/layers/*/fs/bin/*")


class PowerNode(Node):
    """A node whose root directory is on a disk that loses what was not synced."""

    def __init__(self, options: str = "") -> None:
        super().__init__()
        os.mkdir(f"{self.base}/disk")
        self.disk = Disk(Path(self.base, "disk"), self.root, options)
        os.chmod(self.root, 0o711)
        self.note = f"{self.root}/synced.json"

    def _all_ended(self) -> bool:
        """Kill what there is: the nursery also ends by itself, without its daemon."""
        found = [pid for pid, words in processes() if self.base in words]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    def cut(self, lost: str = "") -> None:
        """Cut the power; the node is as after the next boot. The content of the blob ``lost`` was not written."""
        blobs = [name for name in os.listdir(f"{self.root}/content/blobs/sha256") if name not in lost]
        self.disk.sync(*WRITTEN, *(f"content/blobs/sha256/{name}" for name in blobs))
        self.disk.commit_journal()
        self.disk.cut()
        self.kill()
        eventually(self._all_ended)
        for directory in filter(os.path.isdir, (self.state, self.netns)):
            for point in mounts.mounts_below(directory):
                mounts.unmount(point)
            shutil.rmtree(directory)
        os.mkdir(self.state)
        self.disk.boot()
        with open(self.note) as file:
            note = json.load(file)
        with open(self.note, "w") as file:
            json.dump({**note, "boot": "the last one"}, file)

    def digest(self, image: str = NAME) -> str:
        """The digest of the image's file, as a new container has it."""
        container = self.run(self.run_pod("after"), "after", ["sha256sum", "/data"], image=image)
        self.wait(container)
        return self.log(container).split()[0]


@pytest.fixture
def powered(tmp_path: Path) -> Iterator[PowerNode]:
    """A node with an image that is not synced yet."""
    archive = str(tmp_path / "image.tar")
    write_archive(busybox_image(layers=[{"data": DATA}]), archive, NAME)
    node = PowerNode()
    try:
        node.start()
        eventually(lambda: os.path.exists(node.note))  # the first sync is over
        import_image(node, archive)
        yield node
    finally:
        node.close()


def test_a_container_has_the_right_content_after_a_power_cut(powered: PowerNode) -> None:
    before = powered.create(powered.run_pod("before"), "before", ["sleep", "1000"], image=NAME)
    powered.cut()
    powered.start()
    assert powered.digest() == DIGEST
    assert "layer removed after an unclean boot" in powered.daemon_log()
    # The writable layer of a container from before the cut is never used again.
    assert powered.status(before).state == cri.CONTAINER_EXITED
    with refused(grpc.StatusCode.FAILED_PRECONDITION, before):
        powered.client.StartContainer(container_id=before)
    powered.remove_pods()
    assert powered.settled() == []


def test_without_the_note_it_has_lost_it(powered: PowerNode) -> None:
    powered.cut()
    os.unlink(powered.note)
    powered.start()
    assert powered.digest() == hashlib.sha256(b"").hexdigest()


def test_an_orderly_stop_makes_no_suspects(powered: PowerNode) -> None:
    powered.stop()
    powered.disk.cut()
    powered.disk.boot()
    with open(powered.note) as file:
        note = json.load(file)
    assert len(note["layers"]) == 2
    with open(powered.note, "w") as file:
        json.dump({**note, "boot": "the last one"}, file)
    powered.start()
    assert powered.digest() == DIGEST
    assert "no orderly end" not in powered.daemon_log()


def test_an_image_with_a_damaged_blob_is_pulled_again(registry: Registry) -> None:
    image = busybox_image(layers=[{"data": DATA}])
    name = registry.push(image, "data:1")
    node = PowerNode(RIGHT_SIZES)
    try:
        node.start()
        eventually(lambda: os.path.exists(node.note))
        node.client.PullImage(image=cri.ImageSpec(image=name))
        node.cut(lost=image.manifest["layers"][1]["digest"])
        node.start()
        eventually(lambda: not node.client.ImageStatus(image=cri.ImageSpec(image=name)).HasField("image"))
        with refused(grpc.StatusCode.NOT_FOUND, "pull it"):
            node.create(node.run_pod("early"), "early", image=name)
        node.client.PullImage(image=cri.ImageSpec(image=name))
        assert node.digest(name) == DIGEST
    finally:
        node.close()
