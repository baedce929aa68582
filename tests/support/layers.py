"""Layers made by the standard library's tar writer, for the snapshotter's tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from typing import Any

import zstandard

from snapshotter import (
    Layer,
    Snapshotter,
)


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer's file, and the digest of the tar stream in it."""

    path: str
    diff_id: str


def item(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member; ``type``, ``linkname``, ``mode``, ``pax_headers`` and so on as TarInfo has them."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, mode: int = 0o755, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return item(name, b"", type=tarfile.DIRTYPE, mode=mode, **fields)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return item(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return item(name, type=tarfile.LNKTYPE, linkname=target)


def archive(*items: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in items:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def packed(data: bytes, compression: str) -> bytes:
    """Data as the compression has it; "none" leaves it alone."""
    match compression:
        case "gzip":
            return gzip.compress(data, 1)
        case "zstd":
            return zstandard.ZstdCompressor(write_checksum=True).compress(data)
        case _:
            return data


def write_blob(path: str, *items: tuple[tarfile.TarInfo, bytes], compression: str = "gzip") -> Blob:
    data = archive(*items)
    with open(path, "wb") as file:
        file.write(packed(data, compression))
    return Blob(path, digest(data))


async def unpack(snapshotter: Snapshotter, blob: Blob, parent: str | None = None) -> Layer:
    """Commit a blob, under a chain ID that is no digest: the snapshotter takes it as it is."""
    return await snapshotter.unpack(
        blob.path,
        compression="gzip",
        diff_id=blob.diff_id,
        chain_id=f"chain {os.path.basename(blob.path)}",
        parent=parent,
    )
