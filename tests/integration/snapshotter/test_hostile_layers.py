"""Layers that try to reach out of their directory: each is refused, touches nothing and leaves nothing.

Each runs twice: as in production, and without the worker's chroot, so that the path resolution has to hold by
itself.
"""

from __future__ import annotations

import copy
import errno
import gzip
import os
import random
import tarfile
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import pytest
import zstandard

from snapshotter import (
    DiffMismatchError,
    LayerError,
    LayerLimits,
    SnapshotError,
    Snapshotter,
    TruncatedLayerError,
    layer_root,
    mounts,
    removal,
    unpacker,
)
from snapshotter.errors import is_temporary
from snapshotter.tar import TarReader
from tests.support.descriptors import open_on
from tests.support.layers import archive, digest, directory, hardlink, item, packed, symlink

CANARY = "canary"


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("disk"))
    mounts.mount("tmpfs", path, "tmpfs", 0, "mode=0700")
    try:
        os.mkdir(f"{path}/outside")
        with open(f"{path}/outside/{CANARY}", "w") as file:
            file.write("untouched")
        os.utime(f"{path}/outside/{CANARY}", (1, 1))
        os.utime(f"{path}/outside", (1, 1))
        yield path
        assert open_on(path) == []
    finally:
        mounts.umount2(path, mounts.MNT_DETACH)


@pytest.fixture
async def snapshotter(disk: str) -> AsyncIterator[Snapshotter]:
    with_limits = Snapshotter(f"{disk}/snapshots", limits=LayerLimits(max_entries=50, max_bytes=1 << 20))
    yield with_limits
    with_limits.close()


def outside(disk: str) -> str:
    return f"{disk}/outside"


def assert_untouched(disk: str) -> None:
    path = outside(disk)
    assert os.listdir(path) == [CANARY]
    status = os.stat(f"{path}/{CANARY}")
    assert (status.st_mtime, status.st_nlink, os.stat(path).st_mtime) == (1, 1, 1)
    with open(f"{path}/{CANARY}") as file:
        assert file.read() == "untouched"
    assert not os.path.exists("/escaped")
    assert sorted(os.listdir(disk)) in (["outside", "snapshots"], ["alone", "outside", "snapshots"])


async def unpack(snapshotter: Snapshotter, disk: str, data: bytes, diff_id: str | None = None) -> None:
    blob = f"{disk}/snapshots/blob"
    with open(blob, "wb") as file:
        file.write(data)
    identity = diff_id or digest(data)
    try:
        await snapshotter.unpack(blob, compression="none", diff_id=identity, chain_id=identity, parent=None)
    finally:
        os.unlink(blob)
        if not snapshotter.layers():
            assert os.listdir(f"{disk}/snapshots/staging") == []
            assert os.listdir(f"{disk}/snapshots/layers") == []


def unpack_without_chroot(disk: str, data: bytes) -> None:
    # At the depth that it has in staging, so that relative tricks meet the canary.
    os.makedirs(f"{disk}/alone/staging/area/fs")
    area = os.open(f"{disk}/alone/staging/area", os.O_RDONLY)
    root = os.open(f"{disk}/alone/staging/area/fs", os.O_RDONLY)
    pieces = iter([data, b""])
    try:
        unpacker.unpack(TarReader(lambda: next(pieces), LayerLimits(max_entries=50)), root, area)
    finally:
        os.close(area)
        os.close(root)


OUT = "../../../../outside"

TRICKS = {
    "dotdot": ([item(f"{OUT}/new", b"x")], "leads out of the layer"),
    "dotdot in the middle": ([item("a/../../../../../outside/new", b"x")], "leads out of the layer"),
    "dotdot behind a leading slash": ([item("/../new", b"x")], "leads out of the layer"),
    "dotdot as the name itself": ([directory("..")], "leads out of the layer"),
    "directory outside": ([directory(f"{OUT}/new")], "leads out of the layer"),
    "write below a symlink to itself": ([symlink("s", "s"), item("s/file")], "too many symbolic links"),
    "write below a file": ([item("f"), item("f/file")], "not a directory"),
    "hard link to an absolute path": ([hardlink("h", "@outside/canary")], "cannot be reached"),
    "hard link to a relative path": ([hardlink("h", f"{OUT}/canary")], "leads out of the layer"),
    "hard link through a symlink": ([symlink("s", OUT), hardlink("h", "s/canary")], "cannot be reached"),
    "hard link through an absolute symlink": (
        [symlink("s", "@outside"), hardlink("h", "s/canary")],
        "cannot be reached",
    ),
    "hard link to nothing": ([hardlink("h", "missing")], "not in the layer"),
    "hard link to a directory": ([directory("d"), hardlink("h", "d")], "directory"),
    "hard link to the root": ([hardlink("h", ".")], "root"),
    "hard link to a whiteout": ([item(".wh.w"), hardlink("h", "w")], "not in the layer"),
    "hard link to itself": ([item("h"), hardlink("h", "h")], "not in the layer"),
    "hard link placed outside": ([item("f"), hardlink(f"{OUT}/new", "f")], "leads out of the layer"),
    "whiteout of nothing": ([item(".wh.")], "names no file"),
    "whiteout of the directory": ([item("d/.wh..")], "names no file"),
    "whiteout of the parent": ([item(".wh...")], "names no file"),
    "whiteout outside": ([item(f"{OUT}/.wh.canary")], "leads out of the layer"),
    "opaque mark outside": ([item(f"{OUT}/.wh..wh..opq")], "leads out of the layer"),
    "hard link elsewhere as the root": ([hardlink("/", "../outside")], "leads out of the layer"),
    "attribute of overlayfs": (
        [item("f", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/outside"})],
        "overlayfs's own",
    ),
    "attribute of overlayfs on the root": (
        [directory(".", pax_headers={"SCHILY.xattr.trusted.overlay.metacopy": ""})],
        "overlayfs's own",
    ),
    "file as the root": ([item(".", b"x")], "no directory"),
    "name beyond the file system's": ([item("n" * 300)], "too long"),
    "symlink to nothing": ([symlink("s", "")], "no target"),
}  # fmt: skip


def built(items: list[tuple[tarfile.TarInfo, bytes]], disk: str) -> bytes:
    placed = [(copy.copy(info), content) for info, content in items]
    for info, _ in placed:
        info.linkname = info.linkname.replace("@outside", outside(disk))
    return archive(*placed)


@pytest.mark.parametrize("trick", TRICKS)
async def test_trick_is_refused(snapshotter: Snapshotter, disk: str, trick: str) -> None:
    items, told = TRICKS[trick]
    with pytest.raises(LayerError, match=told):
        await unpack(snapshotter, disk, built(items, disk))
    assert_untouched(disk)


@pytest.mark.parametrize("trick", TRICKS)
async def test_trick_is_refused_without_the_chroot(snapshotter: Snapshotter, disk: str, trick: str) -> None:
    items, told = TRICKS[trick]
    with pytest.raises(LayerError, match=told):
        unpack_without_chroot(disk, built(items, disk))
    assert_untouched(disk)


# Symbolic links are resolved with the layer as the root, as they are in the container, and what is missing is made.
HARMLESS = {
    "write through an absolute symlink": (
        [symlink("s", "@outside"), item("s/canary", b"mine")],
        {"@outside/canary": b"mine"},
    ),
    "write through a relative symlink": ([symlink("s", OUT), item("s/canary", b"mine")], {"outside/canary": b"mine"}),
    "write through a chain of symlinks": (
        [directory("d"), symlink("d/up", ".."), symlink("s", "d/up/" + OUT), item("s/canary", b"mine")],
        {"outside/canary": b"mine"},
    ),
    "make a directory below a symlink": ([symlink("s", OUT), directory("s/new/deep")], {}),
    "make parents below a symlink": (
        [symlink("s", OUT), item("s/new/deep/file", b"mine")],
        {"outside/new/deep/file": b"mine"},
    ),
    "write below a dangling symlink": ([symlink("s", "missing"), item("s/file", b"mine")], {"missing/file": b"mine"}),
    "write below a dangling symlink up and down": (
        [directory("a"), symlink("a/s", "../b/./c/../d"), item("a/s/file", b"mine")],
        {"b/d/file": b"mine"},
    ),
    "write through a symlink to /proc": (
        [symlink("s", "/proc/self/root"), item("s/escaped", b"mine")],
        {"proc/self/root/escaped": b"mine"},
    ),
    "symlink in place of a used directory": (
        [directory("d"), item("d/one"), symlink("d", OUT), item("d/canary", b"mine")],
        {"outside/canary": b"mine"},
    ),
    "symlink in place of a used directory's parent": (
        [directory("p"), directory("p/outside"), item("p/outside/one"), symlink("p", "../../../.."),
         item("p/outside/canary", b"mine")],
        {"outside/canary": b"mine"},
    ),
    "symlink swapped between entries": (
        [directory("a"), symlink("s", "a"), item("s/one", b"1"), symlink("s", OUT), item("s/canary", b"mine"),
         symlink("s", "@outside"), item("s/canary", b"mine")],
        {"a/one": b"1", "outside/canary": b"mine", "@outside/canary": b"mine"},
    ),
    "whiteout through a symlink": ([symlink("s", OUT), item("s/.wh.canary"), item("f", b"1")], {"f": b"1"}),
    "opaque mark through a symlink": ([symlink("s", OUT), item("s/.wh..wh..opq"), item("f", b"1")], {"f": b"1"}),
    "hard link through an absolute symlink": (
        [item("d/f", b"mine"), symlink("s", "/d"), hardlink("h", "s/f")],
        {"h": b"mine"},
    ),
    "devices": (
        [item("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
         item("sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0)],
        {},
    ),
    "a symlink that is only replaced": (
        [symlink("s", "@outside/canary"), item("s", b"mine")],
        {"s": b"mine"},
    ),
    "a symlink to a directory replaced by a directory": (
        [symlink("s", "@outside"), directory("s"), item("s/canary", b"mine")],
        {"s/canary": b"mine"},
    ),
    "dotdot that stays inside": ([item("./a/../b/./c", b"mine")], {"b/c": b"mine"}),
    "a leading slash": ([item("/b/c", b"mine")], {"b/c": b"mine"}),
    "a symlink that stays inside": (
        [directory("usr/lib"), symlink("lib", "usr/lib"), item("lib/f", b"mine")],
        {"usr/lib/f": b"mine"},
    ),
    "a symlink up and down inside": (
        [directory("a/b"), directory("c"), symlink("a/b/s", "../../c"), item("a/b/s/f", b"mine")],
        {"c/f": b"mine"},
    ),
    "parents made below a symlink inside": (
        [directory("c"), symlink("s", "c"), item("s/new/f", b"mine")],
        {"c/new/f": b"mine"},
    ),
    "a directory replaced by a file": ([item("d/e/f/g"), item("d", b"mine")], {"d": b"mine"}),
    "a file replaced by a directory": ([item("d"), directory("d"), item("d/f", b"mine")], {"d/f": b"mine"}),
    "a whiteout of a symlink": ([symlink("s", "@outside"), item(".wh.s")], {}),
    "a hard link to a symlink": ([symlink("s", "@outside/canary"), hardlink("h", "s"), item("f", b"1")], {"f": b"1"}),
    "reserved names of AUFS": ([directory(".wh..wh.plnk"), item(".wh..wh.plnk/1.2"), item("f", b"1")], {"f": b"1"}),
    "a pseudo-link of AUFS twice": (
        [item(".wh..wh.plnk/1.2", b"old"), item(".wh..wh.plnk/1.2", b"new"), hardlink("f", ".wh..wh.plnk/1.2")],
        {"f": b"new"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_stays_inside_is_accepted(snapshotter: Snapshotter, disk: str, name: str) -> None:
    items, files = HARMLESS[name]
    data = built(items, disk)
    await unpack(snapshotter, disk, data)
    unpack_without_chroot(disk, data)
    layer = snapshotter.layers()[digest(data)]
    for root in (f"{layer.path}/fs", f"{disk}/alone/staging/area/fs"):
        for path, content in files.items():
            with open(f"{root}/{path.replace('@outside', outside(disk))}", "rb") as file:
                assert file.read() == content
        assert not os.path.exists(f"{root}/.wh..wh.plnk")
        assert not os.path.exists(f"{root}/../pseudo-links")
    assert_untouched(disk)


async def test_content_of_another_digest_is_refused(snapshotter: Snapshotter, disk: str) -> None:
    with pytest.raises(DiffMismatchError, match="configuration names"):
        await unpack(snapshotter, disk, archive(item("f", b"x")), digest(b"another"))


async def test_bytes_after_the_archive_count_for_the_digest(snapshotter: Snapshotter, disk: str) -> None:
    data = archive(item("f", b"x"))
    with pytest.raises(DiffMismatchError):
        await unpack(snapshotter, disk, data + b"more", digest(data))


async def test_a_truncated_archive_is_refused(snapshotter: Snapshotter, disk: str) -> None:
    with pytest.raises(TruncatedLayerError, match="'f'"):
        await unpack(snapshotter, disk, archive(item("f", b"x" * 5000))[:2000])


async def test_too_many_entries_are_refused(snapshotter: Snapshotter, disk: str) -> None:
    with pytest.raises(LayerError, match="more than 50 entries"):
        await unpack(snapshotter, disk, archive(*(item(f"f{n}") for n in range(51))))


async def test_directories_that_no_path_reaches_are_counted(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link shortens the names of entries, so that each makes a thousand directories below the longest path."""
    monkeypatch.setattr(layer_root, "_MAX_NOTED", 100_000)
    deep = "/".join([*["x" * 250] * 16, "y" * 78])
    few, many = ([item(f"s/{number}/{'a/' * 1000}f") for number in range(count)] for count in (1, 10))
    unpack_without_chroot(disk, archive(item(f"{deep}/f"), symlink("s", deep), *few))
    removal.remove_path(f"{disk}/alone")
    with pytest.raises(LayerError, match="directories with whiteouts or without an entry"):
        unpack_without_chroot(disk, archive(item(f"{deep}/f"), symlink("s", deep), *many))


async def test_a_lack_of_descriptors_costs_no_time_of_a_directory(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step opens directories that an entry made; only one that a later entry replaced is passed over."""
    openat2 = mounts.openat2

    def lacking(at: int, path: bytes, flags: int, resolve: int) -> int:
        if flags & os.O_NOFOLLOW:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return openat2(at, path, flags, resolve)

    monkeypatch.setattr(layer_root, "openat2", lacking)
    with pytest.raises(OSError, match="Too many open files"):
        unpack_without_chroot(disk, archive(directory("d")))
    removal.remove_path(f"{disk}/alone")
    monkeypatch.undo()
    unpack_without_chroot(disk, archive(directory("d"), item("d/f"), item("d")))


async def test_a_lack_of_descriptors_is_no_fault_of_a_hard_link(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    openat2 = mounts.openat2

    def lacking(at: int, path: bytes, flags: int, resolve: int) -> int:
        opened.append(path)
        if opened.count(b"d") > 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return openat2(at, path, flags, resolve)

    data = archive(item("d/f"), item("g"), hardlink("link", "d/f"))
    monkeypatch.setattr(layer_root, "openat2", lacking)
    with pytest.raises(SnapshotError, match="hard link 'link': Too many open files") as error:
        unpack_without_chroot(disk, data)
    assert not isinstance(error.value, LayerError)
    assert is_temporary(error.value)
    removal.remove_path(f"{disk}/alone")
    monkeypatch.undo()
    unpack_without_chroot(disk, data)


async def test_too_many_bytes_are_refused_even_after_the_archive(snapshotter: Snapshotter, disk: str) -> None:
    with pytest.raises(LayerError, match="larger than 1048576 bytes"):
        await unpack(snapshotter, disk, archive(item("f")) + bytes(1 << 20))


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_a_compression_bomb_is_refused(disk: str, compression: Literal["gzip", "zstd"]) -> None:
    data = archive(item("f", bytes(4 << 20)))
    snapshotter = Snapshotter(f"{disk}/snapshots", limits=LayerLimits(max_ratio=50, ratio_floor=1 << 20))
    with open(f"{disk}/snapshots/blob", "wb") as file:
        file.write(packed(data, compression))
    diff_id = digest(data)
    with pytest.raises(LayerError, match="more than 50 times"):
        await snapshotter.unpack(
            f"{disk}/snapshots/blob", compression=compression, diff_id=diff_id, chain_id=diff_id, parent=None
        )
    assert os.listdir(f"{disk}/snapshots/staging") == []
    snapshotter.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "checksum", "junk", "empty"])
async def test_a_broken_gzip_stream_is_refused(snapshotter: Snapshotter, disk: str, damage: str) -> None:
    data = archive(item("f", random.Random(1).randbytes(200_000)))
    whole = gzip.compress(data)
    middle = len(whole) // 2
    blob, kind = {
        "cut": (whole[:middle], TruncatedLayerError),
        "flipped": (whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :], SnapshotError),
        "checksum": (whole[:-8] + b"\0\0\0\0" + whole[-4:], LayerError),
        "junk": (whole + b"junk" * 10, LayerError),
        "empty": (b"", DiffMismatchError),
    }[damage]
    with open(f"{disk}/snapshots/blob", "wb") as file:
        file.write(blob)
    diff_id = digest(data)
    with pytest.raises(kind):
        await snapshotter.unpack(
            f"{disk}/snapshots/blob", compression="gzip", diff_id=diff_id, chain_id=diff_id, parent=None
        )
    assert os.listdir(f"{disk}/snapshots/staging") == []
    assert snapshotter.layers() == {}


@pytest.mark.parametrize("damage", ["cut", "flipped", "checksum", "junk", "window"])
async def test_a_broken_zstd_stream_is_refused(snapshotter: Snapshotter, disk: str, damage: str) -> None:
    data = archive(item("f", random.Random(1).randbytes(200_000)))
    whole = packed(data, "zstd")
    middle = len(whole) // 2
    huge = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    blob, kind, words = {
        "cut": (whole[:middle], TruncatedLayerError, "'f'"),
        "flipped": (whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :], SnapshotError, "."),
        "checksum": (whole[:-4] + b"\0\0\0\0", LayerError, "checksum"),
        "junk": (whole + b"junk" * 10, LayerError, "not valid zstd data"),
        "window": (
            zstandard.ZstdCompressor(compression_params=huge).compressobj().compress(data * 1000),
            LayerError,
            "too much memory",
        ),
    }[damage]
    with open(f"{disk}/snapshots/blob", "wb") as file:
        file.write(blob)
    diff_id = digest(data)
    with pytest.raises(kind, match=words):
        await snapshotter.unpack(
            f"{disk}/snapshots/blob", compression="zstd", diff_id=diff_id, chain_id=diff_id, parent=None
        )
    assert os.listdir(f"{disk}/snapshots/staging") == []
    assert snapshotter.layers() == {}
