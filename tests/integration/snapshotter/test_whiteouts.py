"""A container never sees a whiteout, also where it hides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from snapshotter import Layer, Snapshotter, settling
from tests.support.descriptors import room_for
from tests.support.layers import directory, item, symlink, unpack, write_blob

Items = list[tuple[tarfile.TarInfo, bytes]]

# Layers, the lowest first, and all names that a container sees.
CASES: dict[str, tuple[list[Items], set[str]]] = {
    "in the lowest layer": (
        [[item(".wh.top"), directory("d"), item("d/.wh.gone"), item("d/f"), item("e/.wh.gone")]],
        {"d", "d/f", "e"},
    ),
    "in a directory that only this layer has": (
        [[item("kept")], [item("new/.wh.gone"), item("new/deep/.wh.gone"), item("new/f")]],
        {"kept", "new", "new/deep", "new/f"},
    ),
    "of what the layer below does not have": ([[item("d/f")], [item("d/.wh.gone")]], {"d", "d/f"}),
    "of what it has": ([[item("d/f"), item("d/gone")], [item("d/.wh.gone")]], {"d", "d/f"}),
    "two layers above": ([[item("d/f"), item("d/gone")], [item("e")], [item("d/.wh.gone")]], {"d", "d/f", "e"}),
    "in an opaque directory": (
        [[item("d/f"), item("d/gone")], [item("d/.wh..wh..opq"), item("d/.wh.gone"), item("d/g")]],
        {"d", "d/g"},
    ),
    "below an opaque directory": (
        [[item("d/e/f")], [item("d/.wh..wh..opq"), item("d/e/.wh.f")]],
        {"d", "d/e"},
    ),
    "above an opaque root": ([[item("d/f")], [item(".wh..wh..opq"), item("d/.wh.f")]], {"d"}),
    "in place of a whiteout": ([[item("d/f")], [item(".wh.d")], [item("d/.wh.f"), item("d/g")]], {"d", "d/g"}),
    "in place of a file": ([[item("d")], [item("d/.wh.f"), item("d/g")]], {"d", "d/g"}),
    "by a symbolic link": ([[directory("real"), symlink("s", "real"), item("s/.wh.f")]], {"real", "s"}),
    "by a symbolic link to what is below": (
        [[item("real/gone"), symlink("s", "real")], [directory("real"), symlink("s", "real"), item("s/.wh.gone")]],
        {"real", "s"},
    ),
    "in a directory that is replaced later": ([[item("d/.wh.f"), symlink("d", "nowhere")]], {"d"}),
    "as a device": ([[item("d/f", type=tarfile.CHRTYPE)]], {"d"}),
    "a directory with the name of a whiteout": ([[item(".wh.d/f"), item(".wh.d/.wh.e/g")]], {
        ".wh.d", ".wh.d/f", ".wh.d/.wh.e", ".wh.d/.wh.e/g",
    }),
    "the root as a hard link to itself": (
        [[item("/", type=tarfile.LNKTYPE, linkname="."), item("f"), item("./", type=tarfile.LNKTYPE, linkname="/")]],
        {"f"},
    ),
}  # fmt: skip


def found_below(root: str) -> set[str]:
    """The paths of all that can be opened or is listed below ``root``."""
    return {
        os.path.relpath(os.path.join(place, name), root)
        for place, directories, files in os.walk(root)
        for name in (*directories, *files)
    }


async def unpacked(snapshotter: Snapshotter, disk: str, layers: list[Items]) -> list[Layer]:
    made: list[Layer] = []
    for number, items in enumerate(layers):
        blob = write_blob(f"{disk}/{number}", *items)
        made.append(await unpack(snapshotter, blob, made[-1].chain_id if made else None))
    return made


@pytest.mark.parametrize("case", CASES)
async def test_no_whiteout_is_seen(snapshotter: Snapshotter, disk: str, tmp_path: Path, case: str) -> None:
    layers, names = CASES[case]
    made = await unpacked(snapshotter, disk, layers)
    await snapshotter.prepare("box", made[-1].chain_id)
    await snapshotter.mount("box", f"{disk}/target")
    assert found_below(f"{disk}/target") == names
    assert await asyncio.to_thread(subprocess.call, ["cp", "-a", f"{disk}/target", tmp_path / "copy"]) == 0
    await snapshotter.unmount(f"{disk}/target")
    # A whiteout that was deleted is no damage.
    for number, layer in enumerate(made):
        assert await snapshotter.check_layer(layer.chain_id, f"{disk}/{number}") == ""


@pytest.mark.parametrize("room", range(9))
async def test_what_is_deleted_stays_so_when_descriptors_are_short(
    snapshotter: Snapshotter, disk: str, room: int
) -> None:
    lower, upper = await unpacked(snapshotter, disk, [[item("a/b/gone")], [directory("a/b"), item("a/b/.wh.gone")]])
    with room_for(room), contextlib.suppress(OSError):
        settling.settle(upper.path, [lower.path])
    assert os.path.exists(f"{upper.path}/fs/a/b/gone"), "the whiteout"


async def test_a_settled_directory_keeps_its_time(snapshotter: Snapshotter, disk: str) -> None:
    blob = write_blob(f"{disk}/one", directory("d", mtime=10), item("d/.wh.f"), item("d/g"))
    layer = await unpack(snapshotter, blob)
    await snapshotter.mount_layer(layer.chain_id, f"{disk}/target")
    assert os.listdir(f"{disk}/target/d") == ["g"]
    assert os.stat(f"{disk}/target/d").st_mtime == 10
    await snapshotter.unmount(f"{disk}/target")


async def test_a_whiteout_that_hides_something_is_missed(snapshotter: Snapshotter, disk: str) -> None:
    _, top = await unpacked(snapshotter, disk, [[item("d/gone")], [item("d/.wh.gone"), item("new/.wh.gone")]])
    await snapshotter.mount_layer(top.chain_id, f"{disk}/target")
    await snapshotter.unmount(f"{disk}/target")
    os.unlink(f"{top.path}/fs/d/gone")
    assert await snapshotter.check_layer(top.chain_id, f"{disk}/1") == "'d/gone' is missing"


@pytest.mark.parametrize("name", ["foo/sub/.wh.x", "foo/sub/file"])
async def test_a_directory_that_becomes_a_link_later_in_the_layer(
    snapshotter: Snapshotter, disk: str, name: str
) -> None:
    _, upper = await unpacked(
        snapshotter,
        disk,
        [[directory("baz"), item("foo/sub/x")], [item("foo/.wh.bar"), item(name), symlink("foo", "baz"), item("end")]],
    )
    await snapshotter.mount_layer(upper.chain_id, f"{disk}/target")
    assert sorted(os.listdir(f"{disk}/target")) == ["baz", "end", "foo"]
    assert os.readlink(f"{disk}/target/foo") == "baz"
    await snapshotter.unmount(f"{disk}/target")


async def test_a_restart_settles_what_is_left(snapshotter: Snapshotter, disk: str) -> None:
    (layer,) = await unpacked(snapshotter, disk, [[directory("./"), directory("d"), item("d/.wh.f")]])
    again = Snapshotter(f"{disk}/snapshots")
    await again.mount_layer(layer.chain_id, f"{disk}/target")
    assert os.listdir(f"{disk}/target/d") == []
    await again.unmount(f"{disk}/target")
    again.close()
