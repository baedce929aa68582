"""User namespaces of pods: made and pinned with what they own, and snapshots mounted for them."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from structlog.testing import capture_logs

from criserver.errors import CriError, DeadlineExceededError, InvalidArgumentError
from criserver.model import IdMapping
from criserver.network import namespaces, user_namespace
from criserver.network.namespaces import PinnedNamespaces, UserMapping
from snapshotter import Layer, SnapshotError, Snapshotter, mounts
from tests.support.layers import directory, hardlink, item, write_blob

UID, GID = 200_000, 300_000
USER = UserMapping((IdMapping(0, UID, 65536),), (IdMapping(0, GID, 65536),))
NS_GET_USERNS = 0xB701


@pytest.fixture
def base() -> Iterator[str]:
    """A directory on a tmpfs of its own, on which nothing is mounted after a test but what it made there itself."""
    base = tempfile.mkdtemp(prefix="cri-userns-", dir="/run")
    os.chmod(base, 0o711)
    mounts.mount("tmpfs", base, "tmpfs", 0, "mode=0711")
    gc.collect()  # what earlier tests' rubbish has open does not count
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        yield base
        assert mounts.mounts_below(base) == []
        for thread in threading.enumerate():
            if thread.name == "namespaces":  # one may be about to end
                thread.join(30)
                assert not thread.is_alive()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert children() == []
    finally:
        for point in [*mounts.mounts_below(base), base]:
            mounts.umount2(point, mounts.MNT_DETACH)
        os.rmdir(base)


@pytest.fixture
async def pod(base: str) -> AsyncIterator[PinnedNamespaces]:
    yield await namespaces.make(f"{base}/ns", net=False, ipc=False, uts=False, user=USER)
    namespaces.unpin(f"{base}/ns")


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


def children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return f.read().split()


def inside(pin: PinnedNamespaces, *command: str, cwd: str = "/") -> str:
    """What a command of the pod's root prints in the pod's namespaces."""
    enter = [f"--{kind}={path}" for kind in ("user", "net", "ipc", "uts") if (path := getattr(pin, kind))]
    command = ("nsenter", *enter, "--setuid=0", "--setgid=0", *command)
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def owner_of(path: str) -> int:
    """The inode of the user namespace that owns the namespace ``path``."""
    with open(path, "rb") as f:
        fd = fcntl.ioctl(f, NS_GET_USERNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


# Namespaces


async def test_namespaces_are_owned_by_the_pods_user_namespace(base: str) -> None:
    pin = await namespaces.make(
        f"{base}/ns",
        net=True,
        ipc=True,
        uts=True,
        hostname="pod-a",
        sysctls={
            "net.ipv4.ip_unprivileged_port_start": "80",
            "kernel.shm_rmid_forced": "1",
            "fs.mqueue.msg_max": "33",
            "kernel.domainname": "example",
        },
        user=USER,
    )
    assert pin == PinnedNamespaces(*(f"{base}/ns/{kind}" for kind in ("net", "ipc", "uts", "user")))
    assert pin.user is not None
    user = os.stat(pin.user).st_ino
    assert user != os.stat("/proc/self/ns/user").st_ino
    for kind in ("net", "ipc", "uts"):
        assert owner_of(getattr(pin, kind)) == user
        assert os.stat(getattr(pin, kind)).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
    maps = inside(pin, "cat", "/proc/self/uid_map", "/proc/self/gid_map").splitlines()
    assert [line.split() for line in maps] == [["0", str(UID), "65536"], ["0", str(GID), "65536"]]
    assert inside(pin, "cat", "/proc/self/setgroups") == "allow\n"
    assert inside(pin, "hostname") == "pod-a\n"
    names = (
        "net/ipv4/ip_unprivileged_port_start",
        "kernel/shm_rmid_forced",
        "fs/mqueue/msg_max",
        "kernel/domainname",
    )
    assert inside(pin, "cat", *(f"/proc/sys/{name}" for name in names)).split() == ["80", "1", "33", "example"]
    lo = json.loads(inside(pin, "ip", "-json", "address", "show", "lo"))[0]
    assert "UP" in lo["flags"]
    assert [a["local"] for a in lo["addr_info"]] == ["127.0.0.1", "::1"]
    inside(pin, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")  # as the network's administrator
    # A container's /dev/mqueue belongs to its root.
    mount_queues = f"mount -t mqueue q {base} && stat -c %u:%g {base}"
    assert inside(pin, "unshare", "--mount", "sh", "-c", mount_queues) == "0:0\n"

    namespaces.unpin(f"{base}/ns")
    assert os.listdir(base) == []


async def test_a_user_namespace_can_be_made_alone(base: str) -> None:
    pin = await namespaces.make(f"{base}/ns", net=False, ipc=False, uts=False, user=USER)
    assert pin == PinnedNamespaces(None, None, None, f"{base}/ns/user")
    assert os.listdir(f"{base}/ns") == ["user"]
    namespaces.unpin(f"{base}/ns")


@pytest.mark.parametrize(
    "uids",
    [
        (IdMapping(0, UID, 10), IdMapping(5, UID + 100, 10)),
        (IdMapping(0, UID, 10), IdMapping(20, UID + 5, 10)),
        (IdMapping(0, UID, 2**32 - 1),),
        (IdMapping(0, 2**32 - 5, 10),),
        (IdMapping(0, UID, 2**40),),
        (IdMapping(0, UID, 10), IdMapping(10, UID + 10, 0)),
        tuple(IdMapping(n, UID + 2 * n, 1) for n in range(341)),
    ],
    ids=["overlapping", "overlapping on the node", "too long", "beyond the last", "no number", "empty", "too many"],
)
async def test_ids_that_the_kernel_refuses_leave_nothing(base: str, uids: tuple[IdMapping, ...]) -> None:
    for user, name in ((UserMapping(uids, USER.gids), "uid_map"), (UserMapping(USER.uids, uids), "gid_map")):
        with pytest.raises(InvalidArgumentError, match=f"{name} .* is refused by the kernel"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=user)
        assert os.listdir(base) == []


async def test_a_sysctl_that_is_refused_leaves_nothing(base: str) -> None:
    for name, value, reason in (
        ("net.ipv4.ip_forward", "many", "Invalid argument"),
        ("net.ipv4.no_such_thing", "1", "No such file"),
        ("kernel.shm_rmid_forced", "7", "Invalid argument"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"is refused by the kernel: {reason}"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, sysctls={name: value}, user=USER)
        assert os.listdir(base) == []


async def test_a_failed_pin_leaves_nothing(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = namespaces._pin

    def fail_at_user(kind: str, directory: str, source: str) -> str:
        if kind == "user":
            raise OSError(28, "No space left on device")
        return pin(kind, directory, source)

    monkeypatch.setattr(namespaces, "_pin", fail_at_user)
    with pytest.raises(CriError, match="No space left on device"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_a_maker_that_dies_is_told(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_namespace, "_HELPER", "raise ValueError('no such luck')")
    with pytest.raises(CriError, match="no such luck"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_a_maker_that_hangs_is_killed(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_namespace, "_HELPER", "import time; time.sleep(60)")
    monkeypatch.setattr(user_namespace, "_DEADLINE", 0.1)
    with pytest.raises(DeadlineExceededError):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_cancellation_leaves_nothing(base: str) -> None:
    for delay in (0, 0.001, 0.003, 0.006, 0.009, 0.012, 0.014, 0.016, 0.02):
        task = asyncio.create_task(namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
            namespaces.unpin(f"{base}/ns")
        except asyncio.CancelledError:
            pass
        assert os.listdir(base) == []


# Snapshots


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


async def test_a_node_without_user_namespaces_is_told(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.overlay._USERNS_MAKER", "import os; os.write(1, b'-1')")
    snapshotter = Snapshotter(f"{base}/snapshots")
    snapshotter.close()
    words = "snapshots cannot be mounted for user namespaces: the kernel makes no user namespace"
    assert await snapshotter.idmap_trouble() == words
