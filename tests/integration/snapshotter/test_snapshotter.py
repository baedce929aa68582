"""Layers, snapshots and mounts on a real file system, with real worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import glob
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
from structlog.testing import capture_logs

from snapshotter import (
    HelperKilledError,
    HelperTimeoutError,
    Layer,
    LayerLimits,
    SnapshotError,
    SnapshotNotFoundError,
    Snapshotter,
    mounts,
)
from tests.support.layers import Blob, archive, digest, directory, hardlink, item, packed, symlink, unpack, write_blob
from tests.support.waiting import until

CAPABILITY = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)  # cap_net_bind_service, permitted


@pytest.fixture(autouse=True)
async def nothing_untold() -> AsyncIterator[None]:
    """Each error of a test's tasks must be taken. Otherwise asyncio writes it to the daemon's log without its cause."""
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["message"]))
    yield
    gc.collect()
    assert told == []


def staging(disk: str) -> list[str]:
    return os.listdir(f"{disk}/snapshots/staging")


def content(path: str) -> str:
    with open(path) as file:
        return file.read()


async def test_attributes_are_kept(snapshotter: Snapshotter, disk: str) -> None:
    attributes = {
        "SCHILY.xattr.user.colour": "red",
        "SCHILY.xattr.security.selinux": "system_u:object_r:bin_t:s0",
    }
    blob = write_blob(
        f"{disk}/blob",
        directory("./", 0o751, uid=3, gid=4, mtime=50),
        directory("d", 0o1777, mtime=100),
        item("d/file", b"x" * 5000, mode=0o640, uid=11, gid=12, mtime=1.5),
        item("d/read-only", b"x", mode=0o400, mtime=200),
        item("d/suid", b"x", mode=0o4755, uid=1, gid=2, mtime=300),
        item("d/attributes", b"x", mode=0o4755, uid=5, mtime=400, pax_headers=attributes),
        hardlink("d/hard", "d/file"),
        symlink("d/soft", "/absolute/../anything"),
        item("d/pipe", type=tarfile.FIFOTYPE, mode=0o622, uid=9, mtime=500),
        item("made/by/need", b"x"),
        directory("mail", 0o2775, gid=8, mtime=600),
        item("mail/root", b"x", mode=0o600, mtime=700),
        directory("mail/sub", 0o755, mtime=800),
        symlink("mail/link", "root"),
    )
    layer = await unpack(snapshotter, blob)
    root = f"{layer.path}/fs"

    def facts(name: str) -> tuple[int, int, int, float]:
        status = os.lstat(f"{root}/{name}")
        return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime

    assert facts(".") == (0o751, 3, 4, 50)
    assert facts("d") == (0o1777, 0, 0, 100)
    assert facts("d/file") == (0o640, 11, 12, 1.5)
    assert facts("d/read-only") == (0o400, 0, 0, 200)
    assert facts("d/suid") == (0o4755, 1, 2, 300)
    assert facts("d/attributes") == (0o4755, 5, 0, 400)
    assert facts("d/pipe") == (0o622, 9, 0, 500)
    assert stat.S_ISFIFO(os.lstat(f"{root}/d/pipe").st_mode)
    assert os.readlink(f"{root}/d/soft") == "/absolute/../anything"
    assert os.path.samefile(f"{root}/d/hard", f"{root}/d/file")
    assert facts("made/by")[:3] == (0o755, 0, 0)
    # A setgid directory passes on its group; the archive's owner wins.
    assert facts("mail") == (0o2775, 0, 8, 600)
    assert facts("mail/root") == (0o600, 0, 0, 700)
    assert facts("mail/sub") == (0o755, 0, 0, 800)
    assert facts("mail/link")[2] == 0
    assert os.getxattr(f"{root}/d/attributes", "user.colour") == b"red"
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(f"{root}/d/attributes", "security.selinux")
    assert (layer.inodes, layer.size) == (14, 5 * 4096 + 8192 + 5 * 4096)


async def test_a_capability_outlives_owner_and_mode(snapshotter: Snapshotter, disk: str) -> None:
    record = b"SCHILY.xattr.security.capability=" + CAPABILITY + b"\n"
    path, diff_id = with_record(f"{disk}/plain", record, mode=0o755, uid=1, gid=1)
    layer = await snapshotter.unpack(path, compression="none", diff_id=diff_id, chain_id="c", parent=None)
    assert os.getxattr(f"{layer.path}/fs/file", "security.capability") == CAPABILITY


def with_record(path: str, record: bytes, **fields: Any) -> tuple[str, str]:
    """The path and the digest of a plain layer whose one file has a PAX record of bytes that are no text.

    The standard library would write it as text.
    """
    length = len(record) + 3
    record = b"%d %s" % (length + (length > 99), record)
    header, body = item("header", record, type=tarfile.XHDTYPE)
    file, _ = item("file", b"x", **fields)
    padded = body + bytes(-len(body) % 512)
    parts = header.tobuf(tarfile.USTAR_FORMAT), padded, file.tobuf(tarfile.USTAR_FORMAT), b"x".ljust(512, b"\0")
    data = b"".join(parts) + bytes(1024)
    with open(path, "wb") as plain:
        plain.write(data)
    return path, digest(data)


async def test_devices_are_made_as_they_are(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(
        f"{disk}/blob",
        item("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666, mtime=100),
        item("disk", type=tarfile.BLKTYPE, devmajor=259, devminor=1 << 19, mode=0o4660, uid=1, gid=6, mtime=200),
    )
    layer = await unpack(snapshotter, blob)
    null, block = (os.lstat(f"{layer.path}/fs/{name}") for name in ("null", "disk"))
    assert (null.st_mode, null.st_rdev, null.st_mtime) == (stat.S_IFCHR | 0o666, os.makedev(1, 3), 100)
    assert (block.st_mode, block.st_rdev) == (stat.S_IFBLK | 0o4660, os.makedev(259, 1 << 19))
    assert (block.st_uid, block.st_gid, block.st_mtime) == (1, 6, 200)


async def test_a_device_0_0_is_a_whiteout(snapshotter: Snapshotter, disk: str) -> None:
    """What overlayfs takes for one: it hides what is below, can be replaced by a directory and not be linked to."""
    lower = await unpack(snapshotter, write_blob(f"{disk}/lower", item("gone"), item("d/old")))
    null: dict[str, Any] = {"type": tarfile.CHRTYPE, "devmajor": 0, "devminor": 0}
    upper = write_blob(f"{disk}/upper", item("gone", **null), item("d", **null), item("d/new"))
    layer = await unpack(snapshotter, upper, lower.chain_id)
    await snapshotter.mount_layer(layer.chain_id, f"{disk}/target")
    assert os.listdir(f"{disk}/target") == ["d"]
    assert os.listdir(f"{disk}/target/d") == ["new"]
    await snapshotter.unmount(f"{disk}/target")


async def test_an_access_list_is_kept(snapshotter: Snapshotter, disk: str) -> None:
    """Without it the mode's group bits, the list's mask, would be the group's."""
    entries = ((0x01, 6, -1), (0x02, 4, 7), (0x04, 4, -1), (0x10, 6, -1), (0x20, 0, -1))  # tag, bits, identity
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    record = b"SCHILY.xattr.system.posix_acl_access=" + access + b"\n"
    path, diff_id = with_record(f"{disk}/plain", record, mode=0o660)
    layer = await snapshotter.unpack(path, compression="none", diff_id=diff_id, chain_id="c", parent=None)
    assert os.getxattr(f"{layer.path}/fs/file", "system.posix_acl_access") == access
    assert stat.S_IMODE(os.stat(f"{layer.path}/fs/file").st_mode) == 0o660


async def test_whiteouts_and_opaque_directories_hide_what_is_below(snapshotter: Snapshotter, disk: str) -> None:
    lower = write_blob(
        f"{disk}/lower",
        item("gone"),
        item("kept"),
        item("opaque/old"),
        item("emptied/old"),
        item("again/old"),
        item("again2/old"),
        item("again3/old"),
        item("dir-gone/old"),
        item("file/old"),
    )
    upper = write_blob(
        f"{disk}/upper",
        item(".wh.gone"),
        item(".wh.dir-gone"),
        item(".wh.never-there"),
        item("opaque/new"),
        item("opaque/.wh..wh..opq"),
        item("emptied/.wh..wh..opq"),
        # Removed below and made again here, in each order that the entries may have.
        item(".wh.again"),
        directory("again"),
        item("again/new"),
        directory("again2"),
        item("again2/new"),
        item(".wh.again2"),
        item(".wh.again3"),
        item("again3/new"),
        item("file", b"now a file"),
        item(".wh.file"),
    )
    one = await unpack(snapshotter, lower)
    two = await unpack(snapshotter, upper, one.chain_id)
    whiteout = os.lstat(f"{two.path}/fs/gone")
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert os.getxattr(f"{two.path}/fs/opaque", "trusted.overlay.opaque") == b"y"
    target = f"{disk}/target"
    await snapshotter.mount_layer(two.chain_id, target)
    seen = {name: sorted(os.listdir(f"{target}/{name}")) for name in os.listdir(target) if name not in ("file", "kept")}
    assert sorted(os.listdir(target)) == ["again", "again2", "again3", "emptied", "file", "kept", "opaque"]
    assert seen == {
        "opaque": ["new"],
        "emptied": [],
        "again": ["new"],
        "again2": ["new"],
        "again3": ["new"],
    }
    assert content(f"{target}/file") == "now a file"
    await snapshotter.unmount(target)


async def test_an_opaque_root_hides_all_layers_below(snapshotter: Snapshotter, disk: str) -> None:
    one = await unpack(snapshotter, write_blob(f"{disk}/one", item("old")))
    two = await unpack(snapshotter, write_blob(f"{disk}/two", item(".wh..wh..opq"), item("new")), one.chain_id)
    await snapshotter.mount_layer(two.chain_id, f"{disk}/target")
    assert os.listdir(f"{disk}/target") == ["new"]
    await snapshotter.unmount(f"{disk}/target")


@pytest.mark.parametrize("refused", [(mounts, "unshare"), (os, "chdir")])
async def test_mounts_go_on_after_a_thread_could_not_have_a_directory_of_its_own(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch, refused: tuple[Any, str]
) -> None:
    one = await unpack(snapshotter, write_blob(f"{disk}/one", item("file")))
    mounts.mount("tmpfs", f"{disk}/target", "tmpfs")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(*refused, refuse)
        calls = (snapshotter.mount_layer(one.chain_id, f"{disk}/target") for _ in range(8))  # for all threads
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(e) for e in errors] == [SnapshotError] * 8
        assert all("Cannot allocate memory" in str(e) for e in errors)
        await snapshotter.unmount(f"{disk}/target")
    assert mounts.mounts_below(f"{disk}/target") == []
    await snapshotter.mount_layer(one.chain_id, f"{disk}/target")
    assert os.listdir(f"{disk}/target") == ["file"]
    await snapshotter.unmount(f"{disk}/target")


async def test_later_entries_win(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(
        f"{disk}/blob",
        item("f", b"first"),
        item("f", b"second"),
        item("d/e/f"),
        symlink("d", "f"),
        directory("keep", 0o700),
        item("keep/file", b"1"),
        directory("keep", 0o755),
        item("h", b"hard"),
        item("g", b"old"),
        hardlink("g", "h"),
    )
    root = f"{(await unpack(snapshotter, blob)).path}/fs"
    assert content(f"{root}/f") == "second"
    assert os.readlink(f"{root}/d") == "f"
    assert content(f"{root}/keep/file") == "1"
    assert stat.S_IMODE(os.stat(f"{root}/keep").st_mode) == 0o755
    assert content(f"{root}/g") == "hard"
    assert staging(disk) == []


async def test_snapshot_is_written_measured_and_removed(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(f"{disk}/base", directory("./", 0o711, uid=5), item("etc/motd", b"hello"))
    layer = await unpack(snapshotter, blob)
    await snapshotter.prepare("box", layer.chain_id)
    target = f"{disk}/target"
    await snapshotter.mount("box", target)
    assert (stat.S_IMODE(os.stat(target).st_mode), os.stat(target).st_uid) == (0o711, 5)
    before = await snapshotter.usage("box")
    with open(f"{target}/big", "wb") as file:
        file.write(bytes(100_000))
    os.link(f"{target}/big", f"{target}/link")
    with open(f"{target}/etc/motd", "a") as file:
        file.write(" there")
    used = await snapshotter.usage("box")
    upper = snapshotter.snapshots()["box"].path + "/fs"
    du = await asyncio.create_subprocess_exec("du", "-s", "--block-size=1", upper, stdout=subprocess.PIPE)
    told, _ = await du.communicate()
    assert used.bytes == int(told.split()[0])
    assert used.inodes - before.inodes == 3  # big, etc, etc/motd
    assert content(f"{layer.path}/fs/etc/motd") == "hello"

    with pytest.raises(SnapshotError, match="in use by snapshot box"):
        await snapshotter.remove_layer(layer.chain_id)
    await snapshotter.unmount(target)
    await snapshotter.unmount(target)
    assert os.listdir(target) == []
    # Mounted again, the snapshot has what was written: "volatile" leaves a mark that must not stand in the way.
    await snapshotter.mount("box", target)
    assert content(f"{target}/etc/motd") == "hello there"
    await snapshotter.unmount(target)

    await snapshotter.remove("box")
    await snapshotter.remove("box")
    assert dict(snapshotter.snapshots()) == {}
    assert not os.path.exists(upper)
    await snapshotter.remove_layer(layer.chain_id)
    await snapshotter.remove_layer(layer.chain_id)
    assert snapshotter.layer(layer.chain_id) is None
    assert os.listdir(f"{disk}/snapshots/layers") == []
    assert staging(disk) == []


async def test_a_removal_of_a_layer_that_is_cancelled_half_way_deletes_its_files(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the check of an image's layers is cancelled, if one of its blobs is damaged."""
    layer = await unpack(snapshotter, write_blob(f"{disk}/blob", item("f", b"1")))
    retire, moved, go_on = snapshotter._staging.retire, threading.Event(), threading.Event()

    def slow(path: str, name: str) -> None:
        retire(path, name)
        moved.set()
        assert go_on.wait(60)

    monkeypatch.setattr(snapshotter._staging, "retire", slow)
    removal = asyncio.create_task(snapshotter.remove_layer(layer.chain_id))
    await until(moved.is_set)
    removal.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await removal
    assert (dict(snapshotter.layers()), staging(disk)) == ({}, [])


async def test_a_view_is_read_only(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("file", b"x")))
    target = f"{disk}/target"
    await snapshotter.mount_layer(layer.chain_id, target)
    assert content(f"{target}/file") == "x"
    with pytest.raises(OSError, match="Read-only") as error:
        os.mkdir(f"{target}/new")
    assert error.value.errno == errno.EROFS
    await snapshotter.unmount(target)


async def test_a_busy_target_is_unmounted_lazily(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("file", b"x")))
    target = f"{disk}/target"
    await snapshotter.mount_layer(layer.chain_id, target)
    with open(f"{target}/file") as busy:
        await snapshotter.unmount(target)
        assert os.listdir(target) == []
        assert busy.read() == "x"


async def test_unmounting_what_is_not_there_is_no_error(snapshotter: Snapshotter, disk: str) -> None:
    await snapshotter.unmount(f"{disk}/target")
    await snapshotter.unmount(f"{disk}/nowhere")


async def test_127_layers(snapshotter: Snapshotter, disk: str) -> None:
    blobs = [write_blob(f"{disk}/{n:03}", item(f"f{n}", b"x"), item("last", b"%d" % n)) for n in range(127)]
    chains = [f"chain {n:03}" for n in range(127)]
    # All at once: a layer does not wait for its parent.
    await asyncio.gather(
        *(unpack(snapshotter, blob, parent) for blob, parent in zip(blobs, [None, *chains], strict=False))
    )
    await snapshotter.prepare("deep", chains[-1])
    await snapshotter.mount("deep", f"{disk}/target")
    assert len(os.listdir(f"{disk}/target")) == 128
    assert content(f"{disk}/target/last") == "126"
    await snapshotter.unmount(f"{disk}/target")
    with pytest.raises(SnapshotError, match="in use by layer chain 001"):
        await snapshotter.remove_layer(chains[0])


async def test_a_missing_parent_is_told_when_a_snapshot_is_prepared(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/child", item("f")), "parent")
    with pytest.raises(SnapshotNotFoundError, match="layer parent"):
        await snapshotter.prepare("box", layer.chain_id)
    assert staging(disk) == []
    assert os.listdir(f"{disk}/snapshots/active") == []


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "../x", "-x", "a" * 129, "a\n", "a,b", "a:b"])
async def test_a_key_that_is_no_plain_name_is_refused(snapshotter: Snapshotter, disk: str, key: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("f")))
    with pytest.raises(SnapshotError, match="snapshot key"):
        await snapshotter.prepare(key, layer.chain_id)


async def test_a_key_is_taken_once(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("f")))
    await snapshotter.prepare("box", layer.chain_id)
    with pytest.raises(SnapshotError, match="there already"):
        await snapshotter.prepare("box", layer.chain_id)
    with pytest.raises(SnapshotNotFoundError):
        await snapshotter.mount("other", f"{disk}/target")
    with pytest.raises(SnapshotNotFoundError):
        await snapshotter.usage("other")


async def test_a_failed_mount_is_told_with_its_target(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("f")))
    with pytest.raises(SnapshotError, match=f"{disk}/nowhere: No such file"):
        await snapshotter.mount_layer(layer.chain_id, f"{disk}/nowhere")


@pytest.mark.parametrize("said", ["gzip", "zstd"])
@pytest.mark.parametrize("found", ["gzip", "zstd", "none"])
async def test_a_layer_is_of_the_compression_that_its_content_says(
    snapshotter: Snapshotter, disk: str, said: Literal["gzip", "zstd"], found: str
) -> None:
    blob = write_blob(f"{disk}/base", item("f", b"content"), compression=found)
    layer = await snapshotter.unpack(blob.path, compression=said, diff_id=blob.diff_id, chain_id="c", parent=None)
    assert content(f"{layer.path}/fs/f") == "content"


async def test_zstd_frames_are_one_stream_and_skippable_ones_are_passed_over(
    snapshotter: Snapshotter, disk: str
) -> None:
    data = archive(item("f", b"x" * 100_000))
    skippable = b"\x50\x2a\x4d\x18" + (9).to_bytes(4, "little") + b"a toc, as"
    with open(f"{disk}/chunked", "wb") as file:
        file.write(skippable + packed(data[:70_000], "zstd") + skippable + packed(data[70_000:], "zstd") + skippable)
    layer = await unpack(snapshotter, Blob(f"{disk}/chunked", digest(data)))
    assert os.path.getsize(f"{layer.path}/fs/f") == 100_000


async def test_another_compression_is_refused(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(f"{disk}/base", item("f"))
    with pytest.raises(SnapshotError, match="'xz' is not supported"):
        await snapshotter.unpack(
            blob.path,
            compression="xz",  # type: ignore[arg-type]
            diff_id=blob.diff_id,
            chain_id="c",
            parent=None,
        )


async def test_everything_is_found_again_and_staging_is_swept(disk: str) -> None:
    first = Snapshotter(f"{disk}/snapshots")
    one = await unpack(first, write_blob(f"{disk}/one", item("f")))
    two = await unpack(first, write_blob(f"{disk}/two", item("g")), one.chain_id)
    await first.prepare("box", two.chain_id)
    # As SIGKILL leaves it: no close, an unpack half way, a layer on its way out, metadata not written.
    os.makedirs(f"{disk}/snapshots/staging/tmpx/fs/deep/tree")
    os.makedirs(f"{disk}/snapshots/staging/tmpy.1")
    os.makedirs(f"{disk}/snapshots/layers/77/fs")
    os.makedirs(f"{disk}/snapshots/layers/78/fs")
    with open(f"{disk}/snapshots/layers/78/meta.json", "w") as file:
        file.write('{"chain_id": "x"')
    os.makedirs(f"{disk}/snapshots/active/half")

    with capture_logs() as logs:
        second = Snapshotter(f"{disk}/snapshots")
    assert dict(second.layers()) == {one.chain_id: one, two.chain_id: two}
    assert dict(second.snapshots()) == dict(first.snapshots())
    assert staging(disk) == []
    assert sorted(os.listdir(f"{disk}/snapshots/layers")) == ["1", "2"]
    assert os.listdir(f"{disk}/snapshots/active") == ["box"]
    assert sorted((line["log_level"], line["event"], line["path"]) for line in logs) == [
        ("warning", "dropped, as its metadata is unusable", f"{disk}/snapshots/{name}")
        for name in ("active/half", "layers/77", "layers/78")
    ]
    three = await unpack(second, write_blob(f"{disk}/three", item("h")), two.chain_id)
    assert os.path.basename(three.path) == "3"
    await second.mount("box", f"{disk}/target")
    assert sorted(os.listdir(f"{disk}/target")) == ["f", "g"]
    await second.unmount(f"{disk}/target")
    first.close()
    second.close()


async def test_workers_end_with_a_daemon_that_is_killed(disk: str) -> None:
    blob = slow_blob(disk)
    script = (
        "import asyncio, sys; from snapshotter import Snapshotter; "
        "asyncio.run(Snapshotter(sys.argv[1]).unpack(sys.argv[2], compression='gzip', diff_id=sys.argv[3], "
        "chain_id='c', parent=None))"
    )
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, f"{disk}/snapshots", blob.path, blob.diff_id
    )
    try:
        await until(lambda: os.path.isdir(f"{disk}/snapshots/staging"))
        worker = await until_a_worker_writes(disk)
    finally:
        daemon.kill()
        await daemon.wait()
    await until(lambda: not os.path.exists(f"/proc/{worker}/cwd/fs"))
    with capture_logs() as logs:
        successor = Snapshotter(f"{disk}/snapshots")
    assert (dict(successor.layers()), staging(disk), logs) == ({}, [], [])
    successor.close()


def slow_blob(disk: str) -> Blob:
    """A layer on which a worker is busy for a second or so."""
    return write_blob(f"{disk}/slow", *(item(f"d{n % 50}/f{n}", b"x" * 100) for n in range(20_000)))


async def until_a_worker_writes(disk: str) -> int:
    """The pid of the one worker, once it has made files."""
    async with asyncio.timeout(30):
        while True:
            for area in staging(disk):
                if glob.glob(f"{disk}/snapshots/staging/{area}/fs/*"):  # "fs" is made a moment after its directory
                    return worker_of(f"{disk}/snapshots/staging/{area}")
            await asyncio.sleep(0.002)


def worker_of(area: str) -> int:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.path.samefile(f"/proc/{pid}/root", area):
                return int(pid)
        except OSError:
            continue
    raise AssertionError("no worker is chrooted there")


async def test_concurrent_callers_share_one_unpack(snapshotter: Snapshotter, disk: str) -> None:
    blob = slow_blob(disk)
    callers = [asyncio.create_task(unpack(snapshotter, blob)) for _ in range(3)]
    await until_a_worker_writes(disk)
    assert len(staging(disk)) == 1
    callers[0].cancel()
    callers[2].cancel()
    layer = await callers[1]
    assert callers[0].cancelled()
    assert callers[2].cancelled()
    assert await unpack(snapshotter, blob) is layer
    assert os.listdir(f"{disk}/snapshots/layers") == ["1"]
    assert staging(disk) == []
    assert sum(len(names) for _, _, names in os.walk(f"{layer.path}/fs")) == 20_000


async def test_cancelling_the_last_caller_leaves_nothing(snapshotter: Snapshotter, disk: str) -> None:
    blob = slow_blob(disk)
    callers = [asyncio.create_task(unpack(snapshotter, blob)) for _ in range(2)]
    pid = await until_a_worker_writes(disk)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert all(caller.cancelled() for caller in callers)
    assert not os.path.exists(f"/proc/{pid}/exe")
    assert staging(disk) == []
    assert dict(snapshotter.layers()) == {}
    # And the layer can be unpacked afterwards.
    assert (await unpack(snapshotter, blob)).diff_id == blob.diff_id


async def test_a_caller_joins_no_unpack_that_is_going_down(snapshotter: Snapshotter, disk: str) -> None:
    blob = slow_blob(disk)
    first = asyncio.create_task(unpack(snapshotter, blob))
    await until_a_worker_writes(disk)
    first.cancel()
    await asyncio.sleep(0)
    assert (await unpack(snapshotter, blob)).diff_id == blob.diff_id
    assert first.cancelled()
    assert staging(disk) == []


async def test_a_worker_that_dies_is_told(snapshotter: Snapshotter, disk: str) -> None:
    caller = asyncio.create_task(unpack(snapshotter, slow_blob(disk)))
    os.kill(await until_a_worker_writes(disk), 9)
    with pytest.raises(HelperKilledError, match="worker was ended by signal 9"):
        await caller
    assert staging(disk) == []


@contextlib.asynccontextmanager
async def stopped_worker(snapshotter: Snapshotter, disk: str) -> AsyncIterator[tuple[int, asyncio.Task[Layer]]]:
    """The pid of a worker that was stopped in the middle of its layer, and who waits for it."""
    caller = asyncio.create_task(unpack(snapshotter, slow_blob(disk)))
    pid = await until_a_worker_writes(disk)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid, caller
    finally:
        caller.cancel()
        await asyncio.wait([caller])


async def test_a_worker_sees_its_layer_alone(snapshotter: Snapshotter, disk: str) -> None:
    async with stopped_worker(snapshotter, disk) as (pid, _):
        area = f"{disk}/snapshots/staging/{staging(disk)[0]}"
        assert os.path.samefile(f"/proc/{pid}/root", area)
        assert os.path.samefile(f"/proc/{pid}/cwd", area)
        # It is no place in the node's tree: there is no way up from it.
        assert os.readlink(f"/proc/{pid}/root") == "/"
        assert os.path.samefile(f"/proc/{pid}/root/..", area)
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            assert target.startswith(("socket:", "pipe:", "/fs", f"{disk}/slow")) or target == "/"


async def test_a_worker_has_the_capabilities_that_it_needs(snapshotter: Snapshotter, disk: str) -> None:
    async with stopped_worker(snapshotter, disk) as (pid, _):
        status = dict(line.split(":\t", 1) for line in content(f"/proc/{pid}/status").splitlines())
        environment = content(f"/proc/{pid}/environ")
    # chown, dac_override, fowner, fsetid, mknod, setfcap; neither sys_admin nor sys_chroot nor sys_ptrace.
    assert status["CapPrm"] == status["CapEff"] == f"{0x8800001B:016x}"
    assert status["CapInh"] == status["CapAmb"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"].split() == []
    assert environment == ""


async def test_a_worker_is_bounded(snapshotter: Snapshotter, disk: str) -> None:
    async with stopped_worker(snapshotter, disk) as (pid, _):
        limits = {line[:26].strip(): line[26:].split()[0] for line in content(f"/proc/{pid}/limits").splitlines()}
    assert limits["Max core file size"] == "0"
    assert int(limits["Max address space"]) == 1 << 30
    assert int(limits["Max open files"]) == 64
    assert int(limits["Max file size"]) == LayerLimits().max_bytes


async def test_cancelling_ends_a_worker_that_is_stopped(snapshotter: Snapshotter, disk: str) -> None:
    async with stopped_worker(snapshotter, disk) as (pid, caller):
        caller.cancel()
        async with asyncio.timeout(30):
            await asyncio.wait([caller])
        assert not os.path.exists(f"/proc/{pid}/exe")
        assert staging(disk) == []


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_takes_a_worker_that_has_just_ended(snapshotter: Snapshotter, disk: str, turns: int) -> None:
    async with stopped_worker(snapshotter, disk) as (pid, caller):
        os.kill(pid, signal.SIGKILL)
        # The loop sees the end of the process and of its pipes at once. It takes several turns to wake the waiters.
        time.sleep(0.1)  # noqa: ASYNC251
        for _ in range(turns):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        assert staging(disk) == []


async def test_a_worker_that_does_nothing_has_a_deadline(disk: str) -> None:
    snapshotter = Snapshotter(f"{disk}/snapshots", limits=LayerLimits(max_stall=2.5))
    async with stopped_worker(snapshotter, disk) as (pid, caller):
        with pytest.raises(HelperTimeoutError, match=r"did nothing for 2\.5 seconds"):
            await caller
        assert not os.path.exists(f"/proc/{pid}/exe")
        assert staging(disk) == []
    snapshotter.close()


async def test_an_unpack_has_a_deadline(disk: str) -> None:
    snapshotter = Snapshotter(f"{disk}/snapshots", limits=LayerLimits(max_seconds=0.1))
    with pytest.raises(HelperTimeoutError, match=r"longer than 0\.1 seconds \(max_seconds\)"):
        await unpack(snapshotter, slow_blob(disk))
    assert staging(disk) == []
    snapshotter.close()


async def test_a_full_disk_is_the_nodes_trouble(disk: str) -> None:
    os.mkdir(f"{disk}/small")
    mounts.mount("tmpfs", f"{disk}/small", "tmpfs", 0, "size=1m")
    snapshotter = Snapshotter(f"{disk}/small/snapshots")
    with pytest.raises(SnapshotError, match=r"'f'.*No space left") as error:
        await unpack(snapshotter, write_blob(f"{disk}/blob", item("f", bytes(2 << 20))))
    assert type(error.value) is SnapshotError
    told = error.value.__cause__.__cause__ if error.value.__cause__ else None
    assert isinstance(told, OSError)
    assert told.errno == errno.ENOSPC
    assert os.listdir(f"{disk}/small/snapshots/staging") == []
    snapshotter.close()


async def test_a_missing_blob_is_told(snapshotter: Snapshotter, disk: str) -> None:
    with pytest.raises(SnapshotError, match="nowhere"):
        await unpack(snapshotter, Blob(f"{disk}/nowhere", "sha256:" + "0" * 64))
    assert staging(disk) == []


async def test_trees_deeper_than_a_path_are_measured_and_deleted(snapshotter: Snapshotter, disk: str) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("f")))
    await snapshotter.prepare("box", layer.chain_id)
    fd = os.open(snapshotter.snapshots()["box"].path + "/fs", os.O_RDONLY)
    for _ in range(6000):
        os.mkdir("dd", dir_fd=fd)
        below = os.open("dd", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    assert (await snapshotter.usage("box")).inodes == 6002
    with capture_logs() as logs:
        await snapshotter.remove("box")
    assert (staging(disk), logs) == ([], [])


async def test_a_snapshot_that_cannot_be_deleted_is_removed_by_a_later_call(
    snapshotter: Snapshotter, disk: str
) -> None:
    """What hinders it is named, each time, and after a restart too; nothing of what is mounted in it is deleted."""
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("f")))
    await snapshotter.prepare("box.1", layer.chain_id)
    os.makedirs(snapshotter.snapshots()["box.1"].path + "/fs/a/point")
    mounts.mount("tmpfs", snapshotter.snapshots()["box.1"].path + "/fs/a/point", "tmpfs")
    for _ in range(2):
        with pytest.raises(SnapshotError, match=r"staging/removed-.*a file system is mounted there.*a/point"):
            await snapshotter.remove("box.1")
        assert (dict(snapshotter.snapshots()), snapshotter.removable()) == ({}, frozenset({"box.1"}))
    (point,) = mounts.mounts_below(disk)
    os.mkdir(f"{point}/kept")
    with pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
        # A start unmounts what it finds there, but this is as one that is not to be unmounted.
        patch.setattr(mounts, "mounts_below", lambda _: [])
        again = Snapshotter(f"{disk}/snapshots")
    assert again.removable() == {"box.1"}
    assert [line["event"] for line in logs] == ["a deletion in staging failed"]
    assert "a file system is mounted there" in logs[0]["error"]
    assert os.listdir(point) == ["kept"]
    mounts.umount2(point)
    await again.remove("box.1")
    assert (staging(disk), again.removable()) == ([], frozenset())
    again.close()


async def test_a_layer_that_cannot_be_deleted_is_deleted_later_by_the_same_process(
    snapshotter: Snapshotter, disk: str
) -> None:
    layer = await unpack(snapshotter, write_blob(f"{disk}/base", item("point/f")))
    mounts.mount("tmpfs", f"{layer.path}/fs/point", "tmpfs")
    with pytest.raises(SnapshotError, match=r"staging/removed-.*a file system is mounted there"):
        await snapshotter.remove_layer(layer.chain_id)
    with capture_logs() as logs:
        await snapshotter.delete_rest()
    assert [line["event"] for line in logs] == ["a deletion in staging failed"]
    assert len(staging(disk)) == 1
    (point,) = mounts.mounts_below(disk)
    mounts.umount2(point)
    await snapshotter.delete_rest()
    assert staging(disk) == []


@pytest.mark.parametrize("place", ["layers", "active", "staging"])
@pytest.mark.parametrize("kind", ["file", "directory", "link", "not utf-8", "metadata is a directory"])
async def test_what_is_no_layer_and_no_snapshot_keeps_nobody_from_starting(disk: str, place: str, kind: str) -> None:
    first = Snapshotter(f"{disk}/snapshots")
    layer = await unpack(first, write_blob(f"{disk}/base", item("f")))
    await first.prepare("box", layer.chain_id)
    first.close()
    strange = os.path.join(os.fsencode(f"{disk}/snapshots/{place}"), b"\xff" if kind == "not utf-8" else b"7")
    match kind:
        case "file":
            os.close(os.open(strange, os.O_CREAT | os.O_WRONLY))
        case "link":
            os.symlink(os.fsencode(disk), strange)
        case "metadata is a directory":
            os.makedirs(os.path.join(strange, b"meta.json"))
        case _:
            os.mkdir(strange)
    second = Snapshotter(f"{disk}/snapshots")
    second.close()
    assert not os.path.lexists(strange)
    assert staging(disk) == []
    assert (list(second.layers()), list(second.snapshots())) == ([layer.chain_id], ["box"])
    assert sorted(os.listdir(disk)) == ["base", "snapshots", "target"]


def test_mounts_below_are_deepest_first_and_unescaped(disk: str) -> None:
    for name in ("a b", "a b/deep", "a b\\x", "other"):
        os.makedirs(f"{disk}/{name}", exist_ok=True)
        mounts.mount("tmpfs", f"{disk}/{name}", "tmpfs")
    assert mounts.mounts_below(disk) == [f"{disk}/{name}" for name in ("a b/deep", "other", "a b\\x", "a b")]
    assert mounts.mounts_below(f"{disk}/a b") == [f"{disk}/a b/deep"]
    os.symlink("a b", f"{disk}/link")
    assert mounts.mounts_below(f"{disk}/link") == [f"{disk}/a b/deep"]


def test_a_failed_call_names_its_path(disk: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        mounts.mount("tmpfs", f"{disk}/nowhere", "tmpfs")
    assert error.value.filename == f"{disk}/nowhere"
    with pytest.raises(OSError, match="target") as busy:
        mounts.umount2(f"{disk}/target")
    assert busy.value.errno == errno.EINVAL


async def test_what_somebody_has_deleted_is_told_and_can_be_removed(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(f"{disk}/blob", item("f", b"content"))
    layer = await snapshotter.unpack(blob.path, compression="gzip", diff_id=blob.diff_id, chain_id="chain", parent=None)
    await snapshotter.prepare("box", "chain")
    shutil.rmtree(snapshotter.snapshots()["box"].path)
    shutil.rmtree(f"{layer.path}/fs")
    with pytest.raises(SnapshotNotFoundError, match="the files of layer chain are gone"):
        await snapshotter.prepare("other", "chain")
    await snapshotter.remove("box")
    shutil.rmtree(layer.path)
    await snapshotter.remove_layer("chain")
    assert (snapshotter.snapshots(), snapshotter.layers()) == ({}, {})
