"""Snapshots that are mounted for a pod with a user namespace: they belong to its users."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from criserver.network.namespaces import PinnedNamespaces
from snapshotter import HelperKilledError, HelperTimeoutError, Layer, SnapshotError, Snapshotter, mounts
from tests.support.layers import directory, hardlink, item, write_blob
from tests.support.usernamespaces import GID, UID, base, inside, pod

__all__ = ["base", "pod"]


@pytest.fixture
async def snapshotter(base: str) -> AsyncIterator[Snapshotter]:
    os.mkdir(f"{base}/target")
    with capture_logs() as logs:
        made = Snapshotter(f"{base}/snapshots")
        yield made
        await made.unmount(f"{base}/target")
        made.close()
    assert os.listdir(f"{base}/snapshots/staging") == []
    assert logs == []


async def layer(snapshotter: Snapshotter, base: str, chain_id: str, *items: object, parent: str | None = None) -> Layer:
    blob = write_blob(f"{base}/blob", *items)  # type: ignore[arg-type]
    return await snapshotter.unpack(
        blob.path, compression="gzip", diff_id=blob.diff_id, chain_id=chain_id, parent=parent
    )


def ids(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid - UID, status.st_gid - GID


async def test_a_snapshot_belongs_to_the_pods_users(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    one = await layer(
        snapshotter,
        base,
        "one",
        item("root", b"x", mode=0o600),
        item("user", b"hello", mode=0o600, uid=1000, gid=1001),
        item("gone", b"x"),
        item("hidden/old", b"x"),
        item("twice", b"x", uid=7),
        hardlink("again", "twice"),
    )
    two = await layer(
        snapshotter,
        base,
        "two",
        directory("./", 0o2751, uid=3, gid=4),
        item(".wh.gone"),
        item("hidden/.wh..wh..opq"),
        item("hidden/new", b"x", uid=5),
        item("beyond", b"x", uid=70_000),
        parent=one.chain_id,
    )
    target = f"{base}/target"
    await snapshotter.prepare("box", two.chain_id)
    await snapshotter.mount("box", target, userns=pod.user)
    assert mounts.mounts_below(base) == [f"{base}/ns/user", target]
    assert ids(target) == (3, 4)
    assert os.stat(target).st_mode & 0o7777 == 0o2751
    assert [ids(f"{target}/{name}") for name in ("root", "user", "hidden/new", "again")] == [
        (0, 0),
        (1000, 1001),
        (5, 0),
        (7, 0),
    ]
    assert os.lstat(f"{target}/beyond").st_uid == 65534, "a user that the pod does not have"
    assert sorted(os.listdir(target)) == ["again", "beyond", "hidden", "root", "twice", "user"]
    assert os.listdir(f"{target}/hidden") == ["new"]
    assert inside(pod, "stat", "-c", "%u:%g", "root", "user", cwd=target).split() == ["0:0", "1000:1001"]

    change = (
        "echo there >> user; ln twice third; chown 9:9 third; rm hidden/new; mkdir made; touch made/file;"
        "chown 12:13 made/file; mv root moved; chown 20:21 ."
    )
    inside(pod, "sh", "-ec", change, cwd=target)
    names = ("user", "twice", "third", "made", "made/file", "moved", ".")
    expected = [(1000, 1001), (9, 9), (9, 9), (0, 4), (12, 13), (0, 0), (20, 21)]
    assert [ids(f"{target}/{name}") for name in names] == expected
    upper = snapshotter.snapshots()["box"].path + "/fs"
    assert [ids(f"{upper}/{name}") for name in ("user", "made/file")] == [(1000, 1001), (12, 13)]
    assert os.listdir(f"{target}/hidden") == []
    with open(f"{target}/user") as f:
        assert f.read() == "hellothere\n"
    assert (os.lstat(f"{one.path}/fs/user").st_uid, os.lstat(f"{one.path}/fs/user").st_size) == (1000, 5)

    # Mounted again, it is as the container left it.
    await snapshotter.unmount(target)
    await snapshotter.mount("box", target, userns=pod.user)
    assert [ids(f"{target}/{name}") for name in names] == expected
    # And without the namespace, the image's layers are as they were.
    await snapshotter.unmount(target)
    await snapshotter.prepare("plain", two.chain_id)
    await snapshotter.mount("plain", target)
    assert (os.stat(target).st_uid, os.stat(f"{target}/user").st_uid) == (3, 1000)


async def test_a_file_capability_is_the_pods(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    made = await layer(snapshotter, base, "one", item("sh", b"x", mode=0o755))
    version_2 = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)  # cap_net_bind_service, permitted
    os.setxattr(f"{made.path}/fs/sh", "security.capability", version_2)
    await snapshotter.prepare("box", made.chain_id)
    await snapshotter.mount("box", f"{base}/target", userns=pod.user)
    # capabilities(7), "File capability extensions": version 3 names the root user that it is for.
    version_3 = struct.pack("<IIIIII", 0x03000000, 1 << 10, 0, 0, 0, UID)
    assert os.getxattr(f"{base}/target/sh", "security.capability") == version_3


async def test_many_layers(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    chains = [f"chain {n}" for n in range(127)]
    for n, (chain, parent) in enumerate(zip(chains, [None, *chains], strict=False)):
        await layer(snapshotter, base, chain, item(f"f{n}", b"x", uid=n), item("last", b"%d" % n), parent=parent)
    target = f"{base}/target"
    for count in (20, 127):
        await snapshotter.prepare(f"box{count}", chains[count - 1])
        await snapshotter.mount(f"box{count}", target, userns=pod.user)
        assert [ids(f"{target}/f{n}") for n in range(count)] == [(n, 0) for n in range(count)]
        assert len(os.listdir(target)) == count + 1
        assert mounts.mounts_below(base) == [f"{base}/ns/user", target]
        await snapshotter.unmount(target)


async def test_many_at_once(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    made = await layer(snapshotter, base, "one", item("f", b"x", uid=8))
    targets = [f"{base}/target/{n}" for n in range(20)]
    mounts.mount("tmpfs", f"{base}/target", "tmpfs")

    async def mount(number: int, target: str) -> None:
        os.mkdir(target)
        await snapshotter.prepare(f"box{number}", made.chain_id)
        await snapshotter.mount(f"box{number}", target, userns=pod.user if number % 2 else None)

    await asyncio.gather(*(mount(n, target) for n, target in enumerate(targets)))
    assert [os.stat(f"{target}/f").st_uid for target in targets] == [8, UID + 8] * 10
    for target in targets:
        await snapshotter.unmount(target)


async def test_a_failed_mount_leaves_nothing(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    made = await layer(snapshotter, base, "one", item("f", b"x"))
    await snapshotter.prepare("box", made.chain_id)
    target = f"{base}/target"
    for place, userns, reason in (
        (f"{base}/nowhere", pod.user, "No such file"),
        (target, f"{base}/nowhere", "No such file"),
        (target, "/proc/self/ns/user", "Operation not permitted"),
        (target, "/proc/self/ns/net", "Invalid argument"),
    ):
        with pytest.raises(SnapshotError, match=rf"Linux 5\.19 or newer.*{reason}"):
            await snapshotter.mount("box", place, userns=userns)
        assert os.listdir(f"{base}/snapshots/staging") == []
        assert mounts.mounts_below(base) == [f"{base}/ns/user"]
    # The threads are where they were.
    await snapshotter.mount("box", target)
    assert os.stat(f"{target}/f").st_uid == 0


async def test_a_cancelled_mount_leaves_nothing(snapshotter: Snapshotter, base: str, pod: PinnedNamespaces) -> None:
    made = await layer(snapshotter, base, "one", item("f", b"x"))
    await snapshotter.prepare("box", made.chain_id)
    for delay in (0, 0.0001, 0.0003, 0.0006):
        task = asyncio.create_task(snapshotter.mount("box", f"{base}/target", userns=pod.user))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
            await snapshotter.unmount(f"{base}/target")
        except asyncio.CancelledError:
            pass
        assert os.listdir(f"{base}/snapshots/staging") == []
        assert mounts.mounts_below(base) == [f"{base}/ns/user"]


async def test_what_a_crash_left_mounted_is_swept_and_not_deleted(
    snapshotter: Snapshotter, base: str, pod: PinnedNamespaces
) -> None:
    made = await layer(snapshotter, base, "one", item("d/f", b"x"))
    assert pod.user is not None
    staging = f"{base}/snapshots/staging"
    os.makedirs(f"{staging}/tmpa")
    os.makedirs(f"{staging}/tmpb/target")
    mounts.bind_idmapped(f"{base}/snapshots/layers", f"{staging}/tmpa", pod.user)
    mounts.mount("tmpfs", f"{staging}/tmpb/target", "tmpfs")
    os.symlink(f"{base}/snapshots", f"{base}/link")
    Snapshotter(f"{base}/link").close()
    assert os.listdir(staging) == []
    assert mounts.mounts_below(base) == [f"{base}/ns/user"]
    assert os.path.exists(f"{made.path}/fs/d/f")


async def test_support_is_tried_out(snapshotter: Snapshotter, base: str) -> None:
    assert await snapshotter.idmap_trouble() == ""
    assert await snapshotter.idmap_trouble() == ""
    assert mounts.mounts_below(base) == []


async def test_a_file_system_without_idmapped_mounts_is_told(base: str, pod: PinnedNamespaces) -> None:
    for name in ("upper", "work", "lower", "overlay", "target"):
        os.mkdir(f"{base}/{name}")
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    mounts.mount("overlay", f"{base}/overlay", "overlay", 0, options)  # overlays have none
    snapshotter = Snapshotter(f"{base}/overlay/snapshots")
    try:
        assert "Invalid argument" in await snapshotter.idmap_trouble()
        made = await layer(snapshotter, base, "one", item("f", b"x"))
        await snapshotter.prepare("box", made.chain_id)
        with pytest.raises(SnapshotError, match=r"a file system with id-mapped mounts.*Invalid argument"):
            await snapshotter.mount("box", f"{base}/target", userns=pod.user)
        assert os.listdir(f"{base}/overlay/snapshots/staging") == []
    finally:
        snapshotter.close()
        mounts.unmount(f"{base}/overlay")


@pytest.mark.parametrize(
    ("maker", "error", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", HelperKilledError, "ended by signal 9"),
        ("import time; time.sleep(60)", HelperTimeoutError, r"within 0\.1 s"),
    ],
    ids=["killed", "hangs"],
)
async def test_a_trial_that_could_not_be_made_is_made_again(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch, maker: str, error: type[Exception], words: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("snapshotter.overlay._USERNS_MAKER", maker)
        if error is HelperTimeoutError:
            patch.setattr("snapshotter.overlay._USERNS_SECONDS", 0.1)
        with pytest.raises(error, match=words):
            await snapshotter.idmap_trouble()
    assert await snapshotter.idmap_trouble() == ""


async def test_a_node_without_user_namespaces_is_told(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.overlay._USERNS_MAKER", "import os; os.write(1, b'-1')")
    snapshotter = Snapshotter(f"{base}/snapshots")
    snapshotter.close()
    words = "snapshots cannot be mounted for user namespaces: the kernel makes no user namespace"
    assert await snapshotter.idmap_trouble() == words
