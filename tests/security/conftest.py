"""The fixtures of the end-to-end tests, for the attacks."""

from __future__ import annotations

from tests.support.fixtures import busybox_archive, clean_pods, node, nothing_left, pytest_collection_modifyitems

__all__ = ["busybox_archive", "clean_pods", "node", "nothing_left", "pytest_collection_modifyitems"]
