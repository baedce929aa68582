"""File systems with and without the types of files in the lists of directories."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snapshotter import Snapshotter, listed_types
from tests.support.frozen_disk import UNTYPED, mount_disk


@pytest.mark.parametrize("options", [(), UNTYPED], ids=["with types", "without types"])
def test_a_file_system_without_types_is_told(tmp_path: Path, options: tuple[str, ...]) -> None:
    point = tmp_path / "point"
    point.mkdir()
    mount_disk(tmp_path / "disk", point, 16 << 20, *options)
    try:
        snapshotter = Snapshotter(f"{point}/snapshots")
        snapshotter.close()
        words = snapshotter.file_system_trouble()
    finally:
        subprocess.run(["umount", point], check=True)
    assert (f"file system of {point}/snapshots" in words) is (options is UNTYPED)


def test_an_empty_directory_and_one_that_is_not_there(tmp_path: Path) -> None:
    assert listed_types.are_known(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        listed_types.are_known(f"{tmp_path}/nowhere")
