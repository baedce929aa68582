"""What the snapshotter keeps: layers and snapshots."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """A committed layer.

    ``size`` is in bytes, each entry rounded up to blocks of 4 KiB, and ``inodes`` counts the entries that are
    not hard links; both are counted while unpacking, so an entry that a later one replaced is counted too.
    ``opaque`` says that the layer hides every layer below it. ``path`` is the directory that holds ``fs/``.
    """

    chain_id: str
    diff_id: str
    parent: str | None
    size: int
    inodes: int
    opaque: bool
    path: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A writable snapshot on top of the layer ``chain_id``; ``path`` is the directory that holds ``fs/``."""

    key: str
    chain_id: str
    path: str
