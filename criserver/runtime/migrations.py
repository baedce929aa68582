"""Converts stored records of earlier releases to the version of this release.

SANDBOX and CONTAINER are lists of functions. Function N, counted from 1, takes the fields of a record of version N, as
JSON has them, and returns those of version N + 1. Records of release 0.1 have no version in them: they are version 1.

1. A function does not use the classes of today, as these will change.
2. Each change of the stored form is one more function. A new state or a new field is such a change too.
3. A function that was released is never edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Fields = dict[str, Any]
Migration = Callable[[Fields], Fields]


class NewerError(Exception):
    """The record has a version that only a newer criserver knows."""


def _since_0_2(fields: Fields) -> Fields:
    """0.2 had no pods whose handler runs a sandbox container, and no reasons why a pod is not ready."""
    return {**fields, "sandbox_container": False, "reason": ""}


def _containers_since_0_2(fields: Fields) -> Fields:
    """In 0.2 the cgroup of every container was in that of its pod."""
    return {**fields, "cgroup_parent": ""}


def _containers_signalled_each_time(fields: Fields) -> Fields:
    """Each StopContainer sent the stop signal, and none was recorded."""
    return {**fields, "stop_signalled": False}


def _sandboxes_without_a_boot(fields: Fields) -> Fields:
    """The boot in which a pod was made was not recorded."""
    return {**fields, "boot_id": ""}


SANDBOX: tuple[Migration, ...] = (_since_0_2, _sandboxes_without_a_boot)
CONTAINER: tuple[Migration, ...] = (_containers_since_0_2, _containers_signalled_each_time)


def newest(migrations: Sequence[Migration]) -> int:
    """The version of the records that this release writes."""
    return len(migrations) + 1


def bring_forward(fields: Fields, migrations: Sequence[Migration]) -> Fields:
    """The fields in the form of this release, without the version. Raises NewerError; ValueError for a bad version."""
    fields = dict(fields)
    version = fields.pop("version", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"version {version!r}")
    if version > newest(migrations):
        raise NewerError(f"is of version {version}, and this criserver knows {newest(migrations)} at most")
    for migration in migrations[version - 1 :]:
        fields = migration(fields)
    return fields
