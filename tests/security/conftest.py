"""A node for the attacks, as the end-to-end tests have it."""

from __future__ import annotations

from tests.e2e.conftest import busybox_archive, clean_pods, node, nothing_left, pytest_collection_modifyitems

__all__ = ["busybox_archive", "clean_pods", "node", "nothing_left", "pytest_collection_modifyitems"]
