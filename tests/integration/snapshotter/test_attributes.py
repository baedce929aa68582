"""Extended attributes that the file system of the layers has no place for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from snapshotter import SnapshotError, Snapshotter, mounts
from tests.support.layers import directory, item, unpack, write_blob

USER = {"SCHILY.xattr.user.colour": "red", "SCHILY.xattr.user.size": "x" * 100}


@pytest.fixture
def bare_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file system without extended attributes."""
    path = str(tmp_path_factory.mktemp("ramfs"))
    mounts.mount("ramfs", path, "ramfs", 0, "mode=0755")
    try:
        yield path
    finally:
        mounts.umount2(path, mounts.MNT_DETACH)


async def test_attributes_without_a_place_are_left_out_and_told_once(bare_disk: str) -> None:
    blob = write_blob(
        f"{bare_disk}/blob",
        item("f", b"1", pax_headers=USER),
        item("g", b"2", pax_headers=USER),
        directory("d", pax_headers=USER),
    )
    snapshotter = Snapshotter(f"{bare_disk}/snapshots")
    with capture_logs() as logs:
        layer = await unpack(snapshotter, blob)
    (told,) = [line for line in logs if "extended attributes" in line["event"]]
    assert (told["layer"], told["attributes"]) == (blob.diff_id, ["'user.colour'", "'user.size'"])
    assert sorted(os.listdir(f"{layer.path}/fs")) == ["d", "f", "g"]
    # They are no damage.
    assert await snapshotter.check_layer(layer.chain_id, blob.path) == ""
    snapshotter.close()


async def test_a_capability_without_a_place_is_an_error(bare_disk: str) -> None:
    net_raw = "\x01\0\0\x02\0\x20" + "\0" * 14  # cap_net_raw=ep, in revision 2 of the format
    blob = write_blob(f"{bare_disk}/blob", item("f", b"1", pax_headers={"SCHILY.xattr.security.capability": net_raw}))
    snapshotter = Snapshotter(f"{bare_disk}/snapshots")
    with pytest.raises(SnapshotError, match="cannot make file 'f'"):
        await unpack(snapshotter, blob)
    snapshotter.close()


async def test_an_attribute_that_is_too_large_is_left_out(snapshotter: Snapshotter, disk: str) -> None:
    large = {"SCHILY.xattr.user.large": "x" * 70_000, "SCHILY.xattr.user.small": "y"}
    layer = await unpack(snapshotter, write_blob(f"{disk}/blob", item("f", b"1", pax_headers=large)))
    assert os.listxattr(f"{layer.path}/fs/f") == ["user.small"]
    assert await snapshotter.check_layer(layer.chain_id, f"{disk}/blob") == ""
