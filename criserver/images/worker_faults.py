"""The classes of errors for faults of the processes that unpack and compare layers."""

from __future__ import annotations

from collections.abc import Mapping

from criserver.errors import CriError, DeadlineExceededError, UnavailableError
from snapshotter import HelperKilledError, HelperTimeoutError, SnapshotError

_CLASSES: Mapping[type[SnapshotError], type[CriError]] = {
    HelperKilledError: UnavailableError,
    HelperTimeoutError: DeadlineExceededError,
}


def worker_fault(error: SnapshotError) -> type[CriError]:
    """The class for an error of the snapshotter: one of its own where the same call may succeed later."""
    return _CLASSES.get(type(error), CriError)
