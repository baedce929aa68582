"""Layers on disk are compared with the blobs that they were unpacked from."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from snapshotter import Layer, LayerLimits, SnapshotError, Snapshotter, metadata, mounts, worker_process
from tests.support.descriptors import open_on, room_for
from tests.support.layers import Blob, directory, hardlink, item, symlink, write_blob


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("disk"))
    mounts.mount("tmpfs", path, "tmpfs", 0, "mode=0755")
    try:
        yield path
        assert open_on(path) == []
    finally:
        mounts.unmount(path)


@pytest.fixture
async def snapshotter(disk: str) -> AsyncIterator[Snapshotter]:
    made = Snapshotter(f"{disk}/snapshots")
    yield made
    made.close()


def odd(disk: str) -> Blob:
    """A layer in which entries replace, hide, imply and alias each other."""
    return write_blob(
        f"{disk}/blob",
        directory(".", 0o711),
        item("f", b"first"),
        item("f", b"second", mode=0o4755, uid=5, gid=6),
        item("d/e/f"),
        symlink("d", "f"),
        directory("keep", 0o700),
        item("keep/file", b"1"),
        directory("keep", 0o755),
        item("h", b"hard"),
        item("g", b"old"),
        hardlink("g", "h"),
        item("h", b"no longer hard"),
        item(".wh.gone"),
        item(".wh.away"),
        item("away/.wh.more"),
        item("file", b"no directory any more"),
        item("file/below/.wh.more"),
        item("opaque/.wh..wh..opq"),
        directory("again"),
        item(".wh.again"),
        item("implied/by/this", b"x" * 3_000_000),
        item("below/.wh.gone"),
        symlink("alias", "keep"),
        item("alias/file", b"2"),
        item("alias/other", b"3", pax_headers={"SCHILY.xattr.user.mark": "here"}),
        item(".wh..wh.plnk/1", b"left out"),
        item(".wh..wh.plnk/2", b"linked", mode=0o640, uid=3),
        hardlink("linked", ".wh..wh.plnk/2"),
        item("./lead", b"4"),
        item("/root", b"5"),
        symlink("dangling", "/nowhere"),
        symlink("absolute", "/keep"),
        item("absolute/third", b"7"),
        item("null", type=b"3", devmajor=1, devminor=3, mode=0o666),
        item("empty"),
        item("fifo", type=b"6"),
        item("löwe\n", b"6"),
    )


async def unpacked(snapshotter: Snapshotter, blob: Blob) -> Layer:
    return await snapshotter.unpack(blob.path, compression="gzip", diff_id=blob.diff_id, chain_id="chain", parent=None)


async def test_a_layer_is_as_it_was_unpacked(snapshotter: Snapshotter, disk: str) -> None:
    blob = odd(disk)
    await unpacked(snapshotter, blob)
    assert await snapshotter.check_layer("chain", blob.path) == ""
    assert await snapshotter.check_layer("other", blob.path) == ""


def set_mark(fs: str) -> None:
    os.setxattr(f"{fs}/keep/other", "user.mark", b"there")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fs: os.unlink(f"{fs}/empty"), "'empty' is missing"),
        (lambda fs: os.unlink(f"{fs}/gone"), "'gone' is missing"),
        (lambda fs: shutil.rmtree(f"{fs}/opaque"), "'opaque' is missing"),
        (lambda fs: shutil.rmtree(f"{fs}/implied"), "'implied/by/this' is missing"),
        (lambda fs: os.truncate(f"{fs}/keep/file", 0), "'alias/file' has 0 bytes in place of 1"),
        (lambda fs: flip(f"{fs}/implied/by/this"), "'implied/by/this' has another content"),
        (lambda fs: flip(f"{fs}/g"), "'g' has another content"),
        (lambda fs: flip(f"{fs}/linked"), "'linked' has another content"),
        (lambda fs: os.chmod(f"{fs}/f", 0o755), "'f' has the mode 755 in place of 4755"),
        (lambda fs: os.chown(f"{fs}/keep", 1, 2), "'keep' belongs to 1:2 in place of 0:0"),
        (lambda fs: os.chmod(fs, 0o755), "the root has the mode 755 in place of 711"),
        (lambda fs: replace(f"{fs}/dangling"), "'dangling' leads elsewhere"),
        (lambda fs: os.rename(f"{fs}/lead", f"{fs}/fifo"), "'fifo' is no fifo"),
        (lambda fs: os.mkdir(f"{fs}/below/new"), "'below/new' is not of the layer"),
        (lambda fs: subprocess.run(["touch", f"{fs}/d2"], check=True), "'d2' is not of the layer"),
        (lambda fs: replace_device(f"{fs}/null"), "'null' is another device"),
        (set_mark, "'alias/other' has another 'user.mark'"),
        (lambda fs: os.removexattr(f"{fs}/keep/other", "user.mark"), "'alias/other' has lost its attribute"),
        (lambda fs: [os.mkdir(f"{fs}/new{n}") for n in range(9)], "; 4 more"),
    ],
)
async def test_what_has_changed_is_named(
    snapshotter: Snapshotter, disk: str, change: Callable[[str], object], words: str
) -> None:
    blob = odd(disk)
    layer = await unpacked(snapshotter, blob)
    change(f"{layer.path}/fs")
    found = await snapshotter.check_layer("chain", blob.path)
    assert words in found
    if not words.startswith(";"):
        assert ";" not in found.replace("; 'lead' is missing", "").replace("'lead' is missing; ", "")


def flip(path: str) -> None:
    """Change a file's last byte."""
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([byte[0] ^ 1]))


def replace_device(path: str) -> None:
    os.unlink(path)
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def replace(path: str) -> None:
    os.unlink(path)
    os.symlink("/elsewhere", path)


async def test_a_blob_that_is_another_ones_says_nothing_of_the_layer(snapshotter: Snapshotter, disk: str) -> None:
    await unpacked(snapshotter, odd(disk))
    other = write_blob(f"{disk}/other", item("a"))
    assert await snapshotter.check_layer("chain", other.path) == ""
    with open(f"{disk}/broken", "wb") as f:
        f.write(b"\x1f\x8b nonsense")
    assert await snapshotter.check_layer("chain", f"{disk}/broken") == ""
    assert await snapshotter.check_layer("chain", f"{disk}/absent") == ""


async def test_a_default_access_list_changes_nothing_in_its_directory(snapshotter: Snapshotter, disk: str) -> None:
    entries = ((1, 7), (4, 5), (0x20, 0))  # acl(5): the owner everything, the group no writing, others nothing
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, bits, 0xFFFFFFFF) for tag, bits in entries)
    lists = {"SCHILY.xattr.system.posix_acl_default": acl.decode("utf-8", "surrogateescape")}
    blob = write_blob(
        f"{disk}/blob",
        directory("d", 0o755, pax_headers=lists),
        item("d/file", b"1", mode=0o644),
        directory("d/below", 0o755),
        item("other", b"2", pax_headers=lists),
    )
    layer = await unpacked(snapshotter, blob)
    assert await snapshotter.check_layer("chain", blob.path) == ""
    assert os.getxattr(f"{layer.path}/fs/d", "system.posix_acl_default") == acl
    assert os.listxattr(f"{layer.path}/fs/d/below") == []


async def test_a_checker_that_stands_still_has_a_deadline(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_CHECKER", "import time; time.sleep(1000)")
    snapshotter = Snapshotter(f"{disk}/snapshots", limits=LayerLimits(max_stall=2))
    try:
        blob = write_blob(f"{disk}/blob", item("f", b"content"))
        await unpacked(snapshotter, blob)
        with pytest.raises(SnapshotError, match="the layer checker did nothing for 2 seconds"):
            await snapshotter.check_layer("chain", blob.path)
    finally:
        snapshotter.close()


async def test_metadata_that_cannot_be_read_without_descriptors_is_not_damaged(
    snapshotter: Snapshotter, disk: str
) -> None:
    layer = await unpacked(snapshotter, write_blob(f"{disk}/blob", item("f", b"content")))
    with room_for(0), pytest.raises(OSError, match="Too many open files"):
        metadata.check(layer)
    assert metadata.check(layer) == ""


async def test_a_checker_without_descriptors_finds_no_damage(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = directory("d"), item("d/f", b"content", pax_headers={"SCHILY.xattr.user.colour": "red"}), item("e/.wh.g")
    blob = write_blob(f"{disk}/blob", *entries)
    await unpacked(snapshotter, blob)
    short = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (%d, 100))\nmain()"
    outcomes: set[str | int | None] = set()
    for limit in range(3, 9):
        program = worker_process._CHECKER.replace("main()", short % limit)
        monkeypatch.setattr(worker_process, "_CHECKER", program)
        try:
            outcomes.add(await snapshotter.check_layer("chain", blob.path))
        except OSError as e:
            outcomes.add(e.errno)
        monkeypatch.undo()
    assert outcomes == {"", errno.EMFILE}


async def test_a_layer_that_cannot_be_compared_now_is_not_called_sound(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = write_blob(f"{disk}/blob", item("f", b"content"))
    layer = await unpacked(snapshotter, blob)
    os.truncate(f"{layer.path}/fs/f", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", f"{disk}/none")
        os.symlink("none", f"{disk}/none")
        with pytest.raises(OSError, match="levels of symbolic links"):
            await snapshotter.check_layer("chain", blob.path)
    assert "has 1 bytes" in await snapshotter.check_layer("chain", blob.path)
