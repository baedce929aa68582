"""Overlay snapshots by chain ID: layers unpacked in worker processes, mounts, and disk usage.

The snapshotter knows chain IDs and keys, and nothing else of images and containers. It imports nothing of the daemon.
It needs Linux 5.10 or newer, and root.
"""

from __future__ import annotations

from snapshotter.arrival import Arrival
from snapshotter.errors import (
    DiffMismatchError,
    HelperKilledError,
    HelperTimeoutError,
    LayerError,
    LimitError,
    SnapshotError,
    SnapshotNotFoundError,
    TruncatedLayerError,
)
from snapshotter.file_tree import TreeUsage
from snapshotter.limits import LayerLimits
from snapshotter.metadata import Layer, Snapshot
from snapshotter.snapshots import Snapshotter

__all__ = [
    "Arrival",
    "DiffMismatchError",
    "HelperKilledError",
    "HelperTimeoutError",
    "Layer",
    "LayerError",
    "LayerLimits",
    "LimitError",
    "Snapshot",
    "SnapshotError",
    "SnapshotNotFoundError",
    "Snapshotter",
    "TreeUsage",
    "TruncatedLayerError",
]
