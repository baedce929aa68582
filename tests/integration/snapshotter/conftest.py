"""A disk of its own for each test of the snapshotter."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from snapshotter import (
    Snapshotter,
    mounts,
)
from tests.support.descriptors import open_on


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("disk"))
    mounts.mount("tmpfs", path, "tmpfs", 0, "mode=0755")
    try:
        os.mkdir(f"{path}/target")
        yield path
        assert open_on(path) == []
    finally:
        for point in [*mounts.mounts_below(path), path]:
            mounts.umount2(point, mounts.MNT_DETACH)


@pytest.fixture
async def snapshotter(disk: str) -> AsyncIterator[Snapshotter]:
    made = Snapshotter(f"{disk}/snapshots")
    yield made
    made.close()
