"""The tests of one room with real parts: they need root and leave nothing on the host."""

from __future__ import annotations

from tests.support.fixtures import nothing_left, pytest_collection_modifyitems

__all__ = ["nothing_left", "pytest_collection_modifyitems"]
