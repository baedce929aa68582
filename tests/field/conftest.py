"""The fixtures of the corpus."""

from __future__ import annotations

from tests.support.fixtures import nothing_left, pytest_collection_modifyitems

__all__ = ["nothing_left", "pytest_collection_modifyitems"]
