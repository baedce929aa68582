"""A ``root`` and a ``state`` that are reached through symbolic links: the kernel lists mounts by their real paths."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from criserver import reset
from criserver.config import Config, load
from criserver.runtime import filesystems
from criserver.runtime.oci_runtime import OciRuntime
from snapshotter import Snapshotter, mounts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mounts.mount("tmpfs", str(tmp_path), "tmpfs", 0, "mode=0755")
    try:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        yield tmp_path
    finally:
        for point in [*mounts.mounts_below(str(tmp_path)), str(tmp_path)]:
            mounts.umount2(point, mounts.MNT_DETACH)


@pytest.fixture
def config(disk: Path) -> Config:
    file = disk / "config.toml"
    file.write_text(f'root = "{disk}/link/root"\nstate = "{disk}/link/state"\n')
    config = load(str(file))
    os.makedirs(config.root)
    os.makedirs(config.state)
    return config


def mounted(point: str) -> str:
    """A new file system at a path, which is made."""
    os.makedirs(point)
    mounts.mount("tmpfs", point, "tmpfs")
    return point


async def test_all_file_systems_of_a_container_are_unmounted(config: Config, disk: Path) -> None:
    snapshotter = Snapshotter(f"{config.root}/snapshots")
    directory = f"{config.state}/containers/c"
    node: Any = SimpleNamespace(
        container_dir=lambda _: directory, rootfs=lambda _: f"{directory}/rootfs", snapshotter=snapshotter
    )
    for name in ("rootfs", "image0"):
        mounted(f"{directory}/{name}")
    await filesystems.unmount(node, "c")
    snapshotter.close()
    assert mounts.mounts_below(str(disk)) == []


async def test_a_mount_that_a_runtime_has_left_is_unmounted(disk: Path) -> None:
    """The root directory of a handler is a key of its own, and may be behind a link too."""
    runtime = OciRuntime("runc", "runc", f"{disk}/link/runc")
    mounted(f"{runtime.root}/c/runc")
    await runtime.forget("c")
    assert os.listdir(runtime.root) == []


def test_a_reset_sees_mounts_and_shims_that_are_left(config: Config, disk: Path) -> None:
    mounted(f"{config.root}/snapshots/one")
    mounted(f"{config.state}/containers/c/rootfs")
    mounted(f"{config.state}/others/own")
    shim = subprocess.Popen(["sleep", "60"], cwd=f"{config.state}/containers/c")
    try:
        assert list(reset._left(config)) == [
            f"mount {disk}/real/state/containers/c/rootfs",
            f"mount {disk}/real/root/snapshots/one",
            f"process {shim.pid}, a shim",
        ]
    finally:
        shim.kill()
        shim.wait()


async def test_mounts_of_staging_are_swept(config: Config, disk: Path) -> None:
    Snapshotter(f"{config.root}/snapshots").close()
    mounted(f"{config.root}/snapshots/staging/new")
    Snapshotter(f"{config.root}/snapshots").close()
    assert mounts.mounts_below(str(disk)) == []
    assert os.listdir(f"{config.root}/snapshots/staging") == []
