"""Power cuts: what a file system has lost is found before an image is used, and brought back."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from criserver import boot
from criserver.errors import NotFoundError
from snapshotter import Layer, worker_process
from tests.support.imagebuilder import Dir, build_image, write_archive
from tests.support.powercut import RIGHT_SIZES, Disk
from tests.support.rooms import Rooms

NAME = "localhost/image:1"
DATA = os.urandom(300_000)
FEW = os.urandom(100_000)


class Power:
    """A node's image store on a disk, its boots and power cuts."""

    def __init__(self, base: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = Disk(base, str(base / "mnt"), options)
        self.archive = str(base / "image.tar")
        self._boot = base / "boot_id"
        self._boot.write_text("first\n")
        monkeypatch.setattr(boot, "_BOOT_ID", str(self._boot))
        # The first layer has an entry for its root, so it has no implied directories; the second has.
        image = build_image([{".": Dir(), "data": DATA, "few": FEW}, {"top": FEW, "more/top": b"x"}])
        write_archive(image, self.archive, NAME)
        self.rooms = self.start()

    def start(self, *, checking: bool = True) -> Rooms:
        note = f"{self.disk.point}/synced.json" if checking else ""
        self.rooms = Rooms(f"{self.disk.point}/root", note=note)
        return self.rooms

    def cut(self, *synced: str) -> None:
        """A power cut and the next boot. The records and the files ``synced`` were written before, others were not."""
        self.disk.sync("root/db*", *synced)
        self.disk.commit_journal()
        self.disk.cut()
        self.rooms.close()
        self.disk.boot()
        self._boot.write_text("second\n")


@pytest.fixture(params=["", RIGHT_SIZES], ids=["no sizes", "right sizes"])
def options(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def power(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Power]:
    power = Power(tmp_path, options, monkeypatch)
    try:
        yield power
    finally:
        power.rooms.close()
        power.disk.close()


BLOBS = "root/content/blobs/sha256/*"
LAYER_NOTES = "root/snapshots/layers/*/*[!s]"  # meta.json and implied, not fs


def contents(rooms: Rooms) -> list[bytes]:
    image = rooms.images.wanted(NAME)
    return [rooms.read(image, name) for name in ("data", "few", "top", "more/top")]


RIGHT = [DATA, FEW, FEW, b"x"]


def layers_of(rooms: Rooms) -> dict[str, Layer]:
    return dict(rooms.snapshotter.layers())


async def test_without_the_check_a_damaged_layer_is_used(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start(checking=False)
    await rooms.images.checked(rooms.images.wanted(NAME))
    assert contents(rooms) != RIGHT


async def test_a_damaged_layer_is_unpacked_anew_from_its_blob(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    before = layers_of(rooms)
    await rooms.images.checked(rooms.images.wanted(NAME))
    assert contents(rooms) == RIGHT
    assert len(before) == 2
    assert not set(before.values()) & set(layers_of(rooms).values())


async def test_a_layer_whose_metadata_is_lost_is_unpacked_anew(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS)
    rooms = power.start()
    assert layers_of(rooms) == {}
    await rooms.images.checked(rooms.images.wanted(NAME))
    assert contents(rooms) == RIGHT


async def test_what_is_sound_is_kept(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES, "root/snapshots/layers/*/fs/*", "root/snapshots/layers/*/fs/*/*")
    rooms = power.start()
    before = layers_of(rooms)
    assert rooms.images.wanted(NAME)
    (kept,) = (chain for chain in before if before[chain].parent is None)
    await rooms.images.check_suspects()
    assert contents(rooms) == RIGHT
    assert layers_of(rooms)[kept] == before[kept]


@pytest.mark.parametrize("options", [RIGHT_SIZES])
async def test_an_image_with_a_damaged_blob_is_dropped_until_it_is_pulled_again(power: Power) -> None:
    await power.rooms.images.sync()
    image = (await power.rooms.images.import_archive(power.archive))[0]
    layer = max(power.rooms.images._images.blobs(), key=lambda digest: power.rooms.content.size(digest) or 0)
    small = power.rooms.images._images.blobs() - {layer}
    power.cut(*(f"root/content/blobs/{digest.replace(':', '/')}" for digest in small), LAYER_NOTES)
    rooms = power.start()
    with pytest.raises(NotFoundError, match=f"image {image.id} was damaged by an unclean boot of the node; pull it"):
        await rooms.images.checked(rooms.images.wanted(NAME))
    assert rooms.images.get(NAME) is None
    assert rooms.leftovers() == []
    await rooms.images.import_archive(power.archive)
    assert contents(rooms) == RIGHT


@pytest.mark.parametrize("options", [RIGHT_SIZES])
async def test_a_pull_replaces_what_is_damaged(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    layer = max(power.rooms.images._images.blobs(), key=lambda digest: power.rooms.content.size(digest) or 0)
    small = power.rooms.images._images.blobs() - {layer}
    power.cut(*(f"root/content/blobs/{digest.replace(':', '/')}" for digest in small), LAYER_NOTES)
    rooms = power.start()
    await rooms.images.import_archive(power.archive)
    assert contents(rooms) == RIGHT
    assert rooms.content.check(layer) == ""


async def test_what_was_synced_is_not_checked(power: Power) -> None:
    await power.rooms.images.import_archive(power.archive)
    await power.rooms.images.sync()
    power.cut()
    rooms = power.start()
    assert rooms.images._suspects.unclean
    assert rooms.images._images.manifest_to_check(rooms.images.wanted(NAME).id) is None
    assert contents(rooms) == RIGHT


async def test_a_second_start_in_the_new_boot_still_checks(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    await rooms.images.sync()  # the suspects are not checked yet
    rooms.close()
    rooms = power.start()
    await rooms.images.check_suspects()
    assert contents(rooms) == RIGHT
    with open(f"{power.disk.point}/synced.json") as file:
        note = json.load(file)
    assert note["boot"] == "second"
    assert note["layers"].keys() == layers_of(rooms).keys()


async def test_a_restart_of_the_daemon_alone_makes_no_suspects(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.rooms.close()
    rooms = power.start()
    assert not rooms.images._suspects.blobs | rooms.images._suspects.layers


async def test_what_was_removed_and_pulled_again_since_the_sync_is_checked(power: Power) -> None:
    await power.rooms.images.import_archive(power.archive)
    await power.rooms.images.sync()
    await power.rooms.images.remove(NAME)
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    await rooms.images.checked(rooms.images.wanted(NAME))
    assert contents(rooms) == RIGHT


async def test_users_and_the_background_share_one_check(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    image = rooms.images.wanted(NAME)
    await asyncio.gather(rooms.images.check_suspects(), *(rooms.images.checked(image) for _ in range(5)))
    assert contents(rooms) == RIGHT
    assert rooms.snapshotter.commits == 2  # each layer was unpacked once


async def test_a_cancelled_user_leaves_an_image_that_the_next_one_can_use(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    image = rooms.images.wanted(NAME)
    for moment in range(20):
        task = asyncio.create_task(rooms.images.checked(image))
        await asyncio.sleep(moment / 100)
        task.cancel()
        await asyncio.wait([task])
    await rooms.images.checked(image)
    assert contents(rooms) == RIGHT


async def test_what_cannot_be_checked_now_stays_a_suspect(power: Power) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    image = rooms.images.wanted(NAME)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        await rooms.images.checked(image)
    assert rooms.images.get(NAME) is not None
    await rooms.images.checked(image)
    assert contents(rooms) == RIGHT


async def test_a_layer_that_cannot_be_compared_is_unpacked_anew(power: Power, monkeypatch: pytest.MonkeyPatch) -> None:
    await power.rooms.images.sync()
    await power.rooms.images.import_archive(power.archive)
    power.cut(BLOBS, LAYER_NOTES)
    rooms = power.start()
    monkeypatch.setattr(worker_process, "_CHECKER", "import os; os.abort()")
    await rooms.images.checked(rooms.images.wanted(NAME))
    assert contents(rooms) == RIGHT


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
