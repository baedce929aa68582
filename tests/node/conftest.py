"""The installed node, one for the whole run."""

from __future__ import annotations

import pytest

from tests.node.installed import PACKAGES, InstalledNode, command
from tests.support.fixtures import busybox_archive
from tests.vm.releases import PRESENT_PACKAGE

__all__ = ["busybox_archive"]

collect_ignore_glob = [] if PACKAGES else ["test_*"]


@pytest.fixture(scope="session")
def node(busybox_archive: str) -> InstalledNode:
    """The package's daemon, with the busybox image."""
    node = InstalledNode()
    node.install(PRESENT_PACKAGE)
    command("criserver", "image", "import", busybox_archive)
    return node
