"""Image archives: the tar files that ``skopeo copy``, ``podman save`` and ``docker save`` write.

An archive holds an OCI layout (OCI image-spec, image layout) or Docker's manifest.json. If it holds both, the layout
counts. Members are read at their offsets in the archive, and nothing is extracted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from criserver.errors import DataLossError, InvalidArgumentError, NotFoundError
from criserver.images import references
from criserver.images.content import ContentStore, Watcher, digest_of
from criserver.images.manifests import (
    MAX_CONFIG,
    MAX_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    parse_config,
    parse_manifest,
)
from criserver.images.references import Reference
from snapshotter.threads import in_thread

_MAX_MEMBERS = 100_000
_MAX_LINKS = 8
_MAX_HEADER = 1 << 20
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_PACKED = {_GZIP: OCI_LAYER_GZIP, b"\x28\xb5\x2f\xfd": OCI_LAYER_ZSTD}
_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One image of an archive: its manifests, one for each platform, and its names, which may be none.

    ``published`` says that the manifest is in the archive, so its digest is the image's in registries too. It is False
    for a manifest that was made here.
    """

    names: tuple[Reference, ...]
    index: Index
    published: bool


class Archive:
    """An open archive; a :class:`~criserver.images.pull.BlobSource`. Made by :func:`open_archive`."""

    def __init__(self, name: str, tar: tarfile.TarFile, fd: int) -> None:
        self.name = self.origin = f"archive {name}"
        self._tar = tar
        self._fd = fd
        self._members: dict[str, tarfile.TarInfo] = {}
        self._digests: dict[str, str] = {}  # the members of blobs that are not where a layout has them
        self._manifests: dict[str, bytes] = {}

    async def images(self) -> list[ArchivedImage]:
        """The images in the archive. To be called before the other methods. Raises InvalidArgumentError."""
        return await in_thread(self._images)

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index. Raises NotFoundError, DataLossError."""
        if descriptor.digest in self._manifests:
            return self._manifests[descriptor.digest]
        return await in_thread(self._read_manifest, descriptor.digest)

    async def blob(self, descriptor: Descriptor, content: ContentStore, watcher: Watcher | None = None) -> None:
        """Bring a blob into ``content``. Raises NotFoundError, DataLossError, ResourceExhaustedError."""
        name = self._place(descriptor.digest)
        member = self._member(name)
        if member.size != descriptor.size:
            raise DataLossError(f"{self.name}: {name} has {member.size} bytes, and its manifest says {descriptor.size}")
        with content.ingest(descriptor.digest, watcher) as ingest:
            while ingest.size < member.size:
                await ingest.write(await in_thread(self._piece, member, ingest.size))
            ingest.commit(descriptor.digest)

    def _images(self) -> list[ArchivedImage]:
        with self._readable():
            for member in self._tar:
                if len(self._members) >= _MAX_MEMBERS:
                    raise InvalidArgumentError(f"{self.name} has more than {_MAX_MEMBERS} members")
                self._members[posixpath.normpath(member.name)] = member
        if "index.json" in self._members:
            return self._layout_images()
        if "manifest.json" in self._members:
            return self._docker_images()
        raise InvalidArgumentError(f"{self.name} has neither index.json nor manifest.json: it is no image archive")

    def _layout_images(self) -> list[ArchivedImage]:
        index = parse_manifest(self._read("index.json", MAX_MANIFEST), "", f"{self.name}: index.json")
        if isinstance(index, Manifest):
            raise InvalidArgumentError(f"{self.name}: index.json is no index")
        named: dict[str, list[Descriptor]] = {}
        for entry in index.manifests:
            name = entry.annotations.get(_NAME) or entry.annotations.get(_REF_NAME, "")
            # A name such as "latest" is a tag within the layout and names no repository.
            named.setdefault(name if any(c in name for c in "/:@") else "", []).append(entry)
        if not named:
            raise InvalidArgumentError(f"{self.name}: index.json lists no images")
        return [
            ArchivedImage((references.parse(name),) if name else (), Index(tuple(entries)), published=True)
            for name, entries in named.items()
        ]

    def _docker_images(self) -> list[ArchivedImage]:
        what = f"{self.name}: manifest.json"
        try:
            document = json.loads(self._read("manifest.json", MAX_MANIFEST))
        except (ValueError, RecursionError) as e:
            raise InvalidArgumentError(f"{what} is not valid JSON: {e}") from e
        if not isinstance(document, list) or not document:
            raise InvalidArgumentError(f"{what} is not a list of images")
        return [self._docker_image(entry, what) for entry in document]

    def _docker_image(self, entry: Any, what: str) -> ArchivedImage:
        match entry:
            case {"Config": str() as config, "Layers": [*layers]} if all(isinstance(name, str) for name in layers):
                tags = entry.get("RepoTags") or []
            case _:
                raise InvalidArgumentError(f"{what}: an entry lacks Config or Layers")
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise InvalidArgumentError(f"{what}: RepoTags is not a list of names")
        names = tuple(references.parse(tag) for tag in tags)
        body = self._read(config, MAX_CONFIG)
        diff_ids = parse_config(body, f"{self.name}: {config}").diff_ids
        if len(diff_ids) != len(layers):
            raise InvalidArgumentError(f"{what} lists {len(layers)} layers, and {config} {len(diff_ids)}")
        self._digests[digest_of(body)] = config
        described = [self._docker_layer(name, diff_id) for name, diff_id in zip(layers, diff_ids, strict=True)]
        manifest = _oci_manifest(Descriptor(OCI_CONFIG, digest_of(body), len(body)), described)
        digest = digest_of(manifest)
        self._manifests[digest] = manifest
        index = Index((Descriptor(OCI_MANIFEST, digest, len(manifest)),))
        return ArchivedImage(names, index, published=False)

    def _docker_layer(self, name: str, diff_id: str) -> Descriptor:
        """The descriptor of a layer, which docker's format does not have.

        The digest of an uncompressed layer is its diff ID, which is checked when the layer is read. A compressed layer
        is read and hashed for it.
        """
        member = self._member(name)
        start = self._piece(member, 0)
        packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
        if packed is None:
            descriptor = Descriptor(OCI_LAYER, diff_id, member.size)
        else:
            digest, position = hashlib.sha256(), 0
            while piece := self._piece(member, position):
                digest.update(piece)
                position += len(piece)
            descriptor = Descriptor(packed, f"sha256:{digest.hexdigest()}", member.size)
        self._digests[descriptor.digest] = name
        return descriptor

    def _read_manifest(self, digest: str) -> bytes:
        body = self._read(self._place(digest), MAX_MANIFEST)
        if digest_of(body) != digest:
            raise DataLossError(f"{self.name}: the content of manifest {digest} has digest {digest_of(body)}")
        return body

    def _place(self, digest: str) -> str:
        return self._digests.get(digest) or f"blobs/{digest.replace(':', '/')}"

    def _read(self, name: str, limit: int) -> bytes:
        member = self._member(name)
        if member.size > limit:
            raise InvalidArgumentError(f"{self.name}: {name} has {member.size} bytes; {limit} are the most allowed")
        data = bytearray()
        while piece := self._piece(member, len(data)):
            data += piece
        return bytes(data)

    def _piece(self, member: tarfile.TarInfo, position: int) -> bytes:
        """The next bytes of a member from ``position`` on; b"" at its end.

        They are read by offset, and not through the TarFile: concurrent readers would share its one position.
        """
        wanted = min(_CHUNK, member.size - position)
        with self._readable():
            piece = os.pread(self._fd, wanted, member.offset_data + position)
        if wanted and not piece:
            raise InvalidArgumentError(f"{self.name} is damaged: it ends in the middle of {member.name[:200]!r}")
        return piece

    def _member(self, name: str) -> tarfile.TarInfo:
        """The regular file at ``name``, also through a link: old tools write a layer that occurs twice as a link."""
        path = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            member = self._members.get(path)
            if member is None:
                break
            if member.isreg() and not member.issparse():
                return member
            if member.issym():
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
            elif member.islnk():
                path = posixpath.normpath(member.linkname)
            else:
                break
        raise NotFoundError(f"{self.name} has no file {name}")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (tarfile.TarError, OSError, ValueError) as e:
            raise InvalidArgumentError(f"{self.name} is damaged: {e}") from e


@contextmanager
def open_archive(path: str, name: str = "") -> Iterator[Archive]:
    """The archive at ``path``; ``name`` is its name in errors. Raises NotFoundError, InvalidArgumentError."""
    name = name or path
    try:
        file = _BoundedFile(path)
    except OSError as e:
        raise NotFoundError(f"archive {name}: {e.strerror}") from e
    with file:
        if file.read(len(_GZIP)) == _GZIP:
            raise InvalidArgumentError(f"archive {name} is compressed; give it as a plain tar file (gunzip)")
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file)
        except tarfile.TarError as e:
            raise InvalidArgumentError(f"archive {name} is no tar file: {e}") from e
        with tar:
            yield Archive(name, tar, file.fileno())


class _BoundedFile(io.FileIO):
    """A file that refuses large reads: tarfile would read a header of any size into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(-1 if size is None else size)


def _oci_manifest(config: Descriptor, layers: list[Descriptor]) -> bytes:
    """The manifest for an image in docker's format. The same image always gets the same manifest."""

    def described(descriptor: Descriptor) -> dict[str, Any]:
        return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}

    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(config),
        "layers": [described(layer) for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()
