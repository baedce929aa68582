"""Stored records of earlier releases, brought forward.

Each entry is a function that takes the fields of a record of version N, counted from 1 by its place, and returns those
of version N + 1. It takes the fields as JSON has them and knows nothing of today's classes. Whatever changes what is
stored, a new state or one more field too, is one more entry; a released entry is never edited. Records of 0.1 have no
version in them: they are version 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Fields = dict[str, Any]
Migration = Callable[[Fields], Fields]

SANDBOX: tuple[Migration, ...] = ()
CONTAINER: tuple[Migration, ...] = ()


class NewerError(Exception):
    """The record is of a version that only a newer criserver knows."""


def newest(migrations: Sequence[Migration]) -> int:
    """The version that today's records have."""
    return len(migrations) + 1


def bring_forward(fields: Fields, migrations: Sequence[Migration]) -> Fields:
    """The fields as today's records have them, without the version. Raises NewerError, ValueError for no version."""
    fields = dict(fields)
    version = fields.pop("version", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"version {version!r}")
    if version > newest(migrations):
        raise NewerError(f"is of version {version}, and this criserver knows {newest(migrations)} at most")
    for migration in migrations[version - 1 :]:
        fields = migration(fields)
    return fields
