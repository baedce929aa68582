"""How large an image and each of its layers may be.

All values that the unpack worker imports are NamedTuples: importing dataclasses would take a quarter of the start-up
time of a process that is started for each layer.
"""

from __future__ import annotations

from typing import NamedTuple

_GIB = 1 << 30


class LayerLimits(NamedTuple):
    """Bounds on one layer. A layer that exceeds one is refused with a LimitError that names the field.

    - ``max_bytes`` bounds the tar stream and each file, holes included. Whoever pulls an image checks the sizes of its
      blobs too, which are compressed or no layers at all.
    - ``max_ratio`` (stream to blob) is checked from ``ratio_floor`` bytes on: honest layers have runs of zeros that
      compress a thousandfold, but not gigabytes of them.
    - ``max_layers`` is the number of layers of an image; the loader of the image checks it.
    - ``max_name`` is in bytes, for the names of files and for links' targets.
    - ``max_seconds`` bounds the time of one unpack. ``max_stall`` bounds the seconds in which its worker neither reads
      nor takes CPU time. Both raise SnapshotError.
    """

    max_layers: int = 250
    max_entries: int = 2_000_000
    max_bytes: int = 256 * _GIB
    max_ratio: int = 200
    ratio_floor: int = 4 * _GIB
    max_name: int = 4096
    max_seconds: float = 3600.0
    max_stall: float = 300.0
