"""Layers and snapshots, and the file in which each has its metadata."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from snapshotter import errors

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_META = "meta.json"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Layer:
    """A committed layer.

    ``size`` is in bytes, each entry rounded up to blocks of 4 KiB. ``inodes`` counts the entries that are not hard
    links. Both are counted while unpacking, so an entry counts even if a later one has replaced it. ``opaque`` says
    that the layer hides every layer below it. ``path`` is the directory that holds ``fs/``.
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


def write(area: str, meta: dict[str, Any]) -> None:
    """Write the metadata of a layer or snapshot into its directory. Raises OSError."""
    with open(os.path.join(area, _META), "w", encoding="utf-8") as file:
        json.dump(meta, file)


def read_layer(path: str) -> Layer:
    """The layer in the directory ``path``. Raises ValueError or TypeError for unusable metadata, OSError."""
    return Layer(**_read(path), path=path)


def read_snapshot(path: str) -> Snapshot:
    """The snapshot in the directory ``path``.

    Raises ValueError, TypeError or KeyError for unusable metadata, OSError.
    """
    return Snapshot(os.path.basename(path), _read(path)["chain_id"], path)


def check(layer: Layer) -> str:
    """What is wrong with the metadata of a layer on disk; "" if nothing is.

    Raises OSError if the node lacks something now.
    """
    try:
        if read_layer(layer.path) != layer:
            return f"the metadata in {layer.path} is another layer's"
        os.close(os.open(os.path.join(layer.path, "fs"), _DIRECTORY))
    except (ValueError, TypeError) as e:
        return f"the metadata in {layer.path} is unusable: {e}"
    except OSError as e:
        errors.raise_lack(e)
        return f"{layer.path} cannot be read: {e.strerror}"
    return ""


def _read(path: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, _META), encoding="utf-8") as file:
            meta = json.load(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError("no metadata") from None
    if not isinstance(meta, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - one class for all that may be wrong with the file
    return meta
