"""The export of images: a tar file with an OCI layout (OCI image-spec, image layout).

Beside the layout's index.json there is docker's manifest.json for the same blobs, for tools that read only that. The
same images always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from criserver.errors import DataLossError
from criserver.images.content import ContentStore
from criserver.images.digests import new_hash, written
from criserver.images.manifests import OCI_INDEX, Descriptor, Manifest

_PIECE = 1 << 20
_BLOCK = 512  # bytes (tar(5))
_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class Export:
    """An image that is exported under ``names``, of which there may be none."""

    names: tuple[str, ...]
    descriptor: Descriptor
    manifest: Manifest

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """All blobs of the image."""
        return (self.descriptor, self.manifest.config, *self.manifest.layers)


def archive_of(exports: Sequence[Export], content: ContentStore) -> Iterator[bytes]:
    """The pieces of the tar file, in order.

    Raises NotFoundError, and DataLossError in the middle of the file for a blob whose content has another digest.
    """
    yield from _member("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    yield from _member("index.json", _json(_index(exports)))
    yield from _member("manifest.json", _json([_docker_entry(export) for export in exports]))
    blobs = {blob.digest: blob.size for export in exports for blob in export.blobs}
    for digest, size in sorted(blobs.items()):
        yield _header(_place(digest), size)
        yield from _content(digest, size, content)
        yield _padding(size)
    yield bytes(2 * _BLOCK)


def _index(exports: Sequence[Export]) -> dict[str, Any]:
    entries = []
    for export in exports:
        found = export.descriptor
        entry = {"mediaType": found.media_type, "digest": found.digest, "size": found.size}
        # Tools find an image in a layout of several by the whole annotation, so it has the whole name.
        entries += [{**entry, "annotations": {_NAME: name, _REF_NAME: name}} for name in export.names] or [entry]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}


def _docker_entry(export: Export) -> dict[str, Any]:
    return {
        "Config": _place(export.manifest.config.digest),
        "RepoTags": [name for name in export.names if "@" not in name],
        "Layers": [_place(layer.digest) for layer in export.manifest.files],
    }


def _content(digest: str, size: int, content: ContentStore) -> Iterator[bytes]:
    found = new_hash(digest)
    left = size
    with content.open(digest) as file:
        while left and (piece := file.read(min(_PIECE, left))):
            found.update(piece)
            left -= len(piece)
            yield piece
    if left or written(found) != digest:
        raise DataLossError(
            f"blob {digest} is damaged on disk; `criserver image verify` tells which images have it and what to do"
        )


def _member(name: str, data: bytes) -> Iterator[bytes]:
    yield _header(name, len(data)) + data + _padding(len(data))


def _header(name: str, size: int) -> bytes:
    import tarfile  # few nodes export images

    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _place(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
