"""What an image and each of its layers may ask of the node.

A NamedTuple, as all values are that the unpack worker imports: the dataclasses module takes a quarter of the start-up
time of a process that is started for each layer.
"""

from __future__ import annotations

from typing import NamedTuple

_GIB = 1 << 30


class LayerLimits(NamedTuple):
    """Bounds on one layer; a layer that exceeds them is a LimitError, which says the field's name.

    ``max_bytes`` bounds the tar stream and each file, holes included. ``max_ratio`` (stream to blob) holds from
    ``ratio_floor`` bytes on: long runs of zeros compress a thousandfold in honest layers too, but not for gigabytes.
    ``max_layers`` is of an image, and held to by who loads it. ``max_name`` is in bytes and holds for links' targets
    too. ``max_seconds`` bounds the time of one unpack, and ``max_stall`` the seconds in which its worker neither reads
    nor takes any CPU time; their end is a SnapshotError.
    """

    max_layers: int = 250
    max_entries: int = 2_000_000
    max_bytes: int = 256 * _GIB
    max_ratio: int = 200
    ratio_floor: int = 4 * _GIB
    max_name: int = 4096
    max_seconds: float = 3600.0
    max_stall: float = 300.0
