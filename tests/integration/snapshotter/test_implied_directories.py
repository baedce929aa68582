"""A directory that a layer has no entry for keeps its attributes from the layers below."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import stat
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from snapshotter import SnapshotError, Snapshotter, settling, snapshots
from tests.support.descriptors import room_for
from tests.support.layers import directory, item, symlink, unpack, write_blob


def facts(path: str) -> tuple[int, int, int, float]:
    status = os.lstat(path)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime


async def mounted(snapshotter: Snapshotter, disk: str, chain_id: str, key: str = "pod") -> str:
    """The root of a writable snapshot."""
    target = f"{disk}/{key}"
    os.mkdir(target)
    await snapshotter.prepare(key, chain_id)
    await snapshotter.mount(key, target)
    return target


BASE = (
    directory("./", 0o711, uid=7, mtime=10),
    directory("tmp", 0o1777, mtime=20),
    directory("home", 0o755, mtime=30),
    directory("home/user", 0o700, uid=1000, gid=1000, mtime=40, pax_headers={"SCHILY.xattr.user.colour": "red"}),
    symlink("lib", "usr/lib"),
    directory("etc", 0o750, uid=5, mtime=50),
)


async def test_they_keep_what_the_layer_below_gave_them(snapshotter: Snapshotter, disk: str) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    top = await unpack(
        snapshotter,
        write_blob(
            f"{disk}/top",
            item("tmp/file", b"x"),
            item("home/user/new/file", b"x"),
            item("lib/file", b"x"),
            item("opt/file", b"x"),
        ),
        base.chain_id,
    )
    root = await mounted(snapshotter, disk, top.chain_id)
    assert facts(root)[:2] == (0o711, 7)
    assert facts(f"{root}/tmp") == (0o1777, 0, 0, 20)
    assert facts(f"{root}/home") == (0o755, 0, 0, 30)
    assert facts(f"{root}/home/user") == (0o700, 1000, 1000, 40)
    assert os.getxattr(f"{root}/home/user", "user.colour") == b"red"
    # What no layer below has, or what a directory takes the place of, gives nothing.
    for name in ("home/user/new", "opt", "lib"):
        assert facts(f"{root}/{name}")[:3] == (0o755, 0, 0)


async def test_through_several_layers_and_at_once(snapshotter: Snapshotter, disk: str) -> None:
    parent = (await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))).chain_id
    for number in range(3):
        blob = write_blob(f"{disk}/{number}", item(f"home/user/{number}", b"x"))
        parent = (await unpack(snapshotter, blob, parent)).chain_id
    roots = await asyncio.gather(*(mounted(snapshotter, disk, parent, f"pod{n}") for n in range(3)))
    for root in roots:
        assert facts(f"{root}/home/user") == (0o700, 1000, 1000, 40)
        assert sorted(os.listdir(f"{root}/home/user")) == ["0", "1", "2"]


async def test_an_entry_that_comes_later_counts(snapshotter: Snapshotter, disk: str) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    entries = item("tmp/file", b"x"), directory("tmp", 0o711, uid=3, mtime=60)
    top = await unpack(snapshotter, write_blob(f"{disk}/top", *entries), base.chain_id)
    assert facts(f"{await mounted(snapshotter, disk, top.chain_id)}/tmp") == (0o711, 3, 0, 60)


@pytest.mark.parametrize("hidden", [".wh.etc", "etc/.wh..wh..opq"])
async def test_what_is_hidden_gives_nothing(snapshotter: Snapshotter, disk: str, hidden: str) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    middle = await unpack(snapshotter, write_blob(f"{disk}/middle", item(hidden, b"")), base.chain_id)
    top = await unpack(snapshotter, write_blob(f"{disk}/top", item("etc/file", b"x")), middle.chain_id)
    found = facts(f"{await mounted(snapshotter, disk, top.chain_id)}/etc")
    # An opaque directory hides what is in the one below, and is itself that directory.
    assert found[:2] == ((0o755, 0) if hidden == ".wh.etc" else (0o750, 5))


async def test_what_the_same_layer_hides_gives_nothing(snapshotter: Snapshotter, disk: str) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    entries = item(".wh.etc", b""), item("etc/file", b"x")
    top = await unpack(snapshotter, write_blob(f"{disk}/top", *entries), base.chain_id)
    assert facts(f"{await mounted(snapshotter, disk, top.chain_id)}/etc")[:2] == (0o755, 0)


@pytest.mark.parametrize("room", range(9))
async def test_they_keep_it_or_are_tried_again_when_descriptors_are_short(
    snapshotter: Snapshotter, disk: str, room: int
) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    top = await unpack(snapshotter, write_blob(f"{disk}/top", item("home/user/file", b"x")), base.chain_id)
    with room_for(room), contextlib.suppress(OSError):
        settling.settle(top.path, [base.path])
    assert os.path.exists(f"{top.path}/implied") or facts(f"{top.path}/fs/home/user") == (0o700, 1000, 1000, 40)
    settling.settle(top.path, [base.path])
    assert facts(f"{top.path}/fs/home/user") == (0o700, 1000, 1000, 40)
    assert not os.path.exists(f"{top.path}/implied")


async def test_a_restart_finds_what_is_not_settled(snapshotter: Snapshotter, disk: str) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    top = await unpack(snapshotter, write_blob(f"{disk}/top", item("tmp/file", b"x")), base.chain_id)
    again = Snapshotter(f"{disk}/snapshots")
    try:
        await again.mount_layer(top.chain_id, f"{disk}/target")
        assert facts(f"{disk}/target/tmp") == (0o1777, 0, 0, 20)
    finally:
        again.close()
    assert not os.path.exists(f"{top.path}/implied")


async def test_65000_files_in_one_directory(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(f"{disk}/many", *(item(f"many/{number:05}", b"") for number in range(65_000)))
    layer = await unpack(snapshotter, blob)
    assert len(os.listdir(f"{layer.path}/fs/many")) == 65_000
    assert layer.inodes == 65_001


async def test_a_layer_that_takes_long_holds_up_no_other_image(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    slow = await unpack(snapshotter, write_blob(f"{disk}/slow", item("tmp/slow", b"x")), base.chain_id)
    quick = await unpack(snapshotter, write_blob(f"{disk}/quick", item("tmp/quick", b"x")), base.chain_id)
    gate, begun, settle = threading.Event(), list[str](), settling.settle

    def gated(path: str, below: Sequence[str], check: Callable[[], None]) -> None:
        if path == slow.path:
            begun.append(path)
            gate.wait()
        settle(path, below, check)

    monkeypatch.setattr(settling, "settle", gated)
    waiting = [asyncio.ensure_future(mounted(snapshotter, disk, slow.chain_id, f"slow{n}")) for n in range(6)]
    try:
        root = await mounted(snapshotter, disk, quick.chain_id, "other")
        assert facts(f"{root}/tmp") == (0o1777, 0, 0, 20)
        assert not any(one.done() for one in waiting)
    finally:
        gate.set()
    for root in await asyncio.gather(*waiting):
        assert facts(f"{root}/tmp") == (0o1777, 0, 0, 20)
    assert begun == [slow.path]


async def test_a_layer_that_takes_long_leaves_processor_time_to_others(
    snapshotter: Snapshotter, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may take hours, and each thread that works in Python keeps the event loop waiting."""
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    tops = [
        await unpack(snapshotter, write_blob(f"{disk}/{name}", item(f"tmp/{name}", b"x")), base.chain_id)
        for name in ("one", "two")
    ]
    steps = [0.25, 0.5, 0.5, 0.25, 0.125]  # each exact in binary
    slept = collections.defaultdict[int, list[float]](list)
    clocks = collections.defaultdict[int, float](float)  # by thread
    together = threading.Barrier(2, timeout=60)

    def settle(path: str, below: Sequence[str], check: Callable[[], None]) -> None:
        together.wait()
        for step in steps:
            clocks[threading.get_ident()] += step
            check()
        together.wait()

    def sleep(seconds: float) -> None:
        slept[threading.get_ident()].append(seconds)
        clocks[threading.get_ident()] += seconds

    monkeypatch.setattr(settling, "settle", settle)
    clock = SimpleNamespace(monotonic=lambda: clocks[threading.get_ident()], sleep=sleep)
    monkeypatch.setattr(snapshots, "time", clock)
    await asyncio.gather(*(snapshotter.prepare(f"s{n}", top.chain_id) for n, top in enumerate(tops)))
    # Two at once: each rests twice as long as it works, once it has worked for a second, and never for over a second.
    assert list(slept.values()) == [[1.0, 0.5, 0.25]] * 2


async def test_a_layer_that_takes_longer_than_an_unpack_may_is_an_error_of_its_image(
    snapshotter: Snapshotter, disk: str
) -> None:
    base = await unpack(snapshotter, write_blob(f"{disk}/base", *BASE))
    top = await unpack(snapshotter, write_blob(f"{disk}/top", item("tmp/file", b"x")), base.chain_id)
    usual = snapshotter.limits
    snapshotter.limits = usual._replace(max_seconds=-1.0)
    with pytest.raises(SnapshotError, match=f"layer {top.chain_id} cannot be made ready: .* longer than an unpack may"):
        await snapshotter.prepare("late", top.chain_id)
    snapshotter.limits = usual
    root = await mounted(snapshotter, disk, top.chain_id)
    assert facts(f"{root}/tmp") == (0o1777, 0, 0, 20)
