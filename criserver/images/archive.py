"""Image archives: the tar files that ``skopeo copy``, ``podman save`` and ``docker save`` write.

An archive holds an OCI layout (OCI image-spec, image layout) or Docker's manifest.json. If it holds both, the layout
counts. Members are read at their offsets in the archive, and nothing is extracted. A compressed archive is decompressed
first (criserver.images.archive_file).
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from criserver.errors import DataLossError, InvalidArgumentError, NotFoundError
from criserver.images.archive_file import GZIP, ZSTD, plain_file
from criserver.images.archive_members import Member, read_members
from criserver.images.archive_names import is_whole
from criserver.images.content import ContentStore, Watcher
from criserver.images.digests import digest_of, new_hash, written
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
    is_attestation,
    parse_config,
    parse_manifest,
)
from snapshotter.limits import LayerLimits
from snapshotter.threads import in_thread

_MAX_IMAGES = 1000  # of Docker's manifest.json, as many as an index may have
_MAX_LINKS = 8
_CHUNK = 1 << 20
_PACKED = {GZIP: OCI_LAYER_GZIP, ZSTD: OCI_LAYER_ZSTD}
_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One image of an archive: its manifests, one for each platform, and its names as the archive has them.

    A name without a repository is a tag (see criserver.images.archive_names). There may be no name.

    ``published`` says that the manifest is in the archive, so its digest is the image's in registries too. It is False
    for a manifest that was made here.
    """

    names: tuple[str, ...]
    index: Index
    published: bool


class Archive:
    """An open archive; a :class:`~criserver.images.pull.BlobSource`. Made by :func:`open_archive`."""

    def __init__(self, name: str, fd: int, limits: LayerLimits) -> None:
        self.name = self.origin = name
        self._fd = fd
        self._limits = limits
        self._members: dict[str, Member] = {}
        self._digests: dict[str, str] = {}  # the members of blobs that are not where a layout has them
        self._manifests: dict[str, bytes] = {}
        # Docker's format has no descriptors, so they are made here. None stands for a layer that is not compressed: its
        # descriptor has the diff ID.
        self._configs: dict[Member, tuple[Descriptor, tuple[str, ...]]] = {}
        self._layers: dict[Member, Descriptor | None] = {}

    async def images(self) -> list[ArchivedImage]:
        """The images in the archive. To be called before the other methods. Raises InvalidArgumentError."""
        return await in_thread(self._images)

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index. Raises NotFoundError, DataLossError."""
        if descriptor.digest in self._manifests:
            return self._manifests[descriptor.digest]
        return await in_thread(self._read_manifest, descriptor.digest)

    async def blob(
        self,
        descriptor: Descriptor,
        content: ContentStore,
        watcher: Watcher | None = None,
        *,
        at_once: bool = False,  # noqa: ARG002 - the protocol's
    ) -> None:
        """Bring a blob into ``content``. Raises NotFoundError, DataLossError, ResourceExhaustedError."""
        name = self._place(descriptor.digest)
        member = self._member(name)
        if member.size != descriptor.size:
            raise DataLossError(f"{self.name}: {name} has {member.size} bytes, and its manifest says {descriptor.size}")
        async with content.ingest(descriptor.digest, watcher) as ingest:
            while ingest.size < member.size:
                await ingest.write(await in_thread(self._piece, member, ingest.size))
            await ingest.commit(descriptor.digest)

    def _images(self) -> list[ArchivedImage]:
        self._members = read_members(self._fd, self.name, self._limits)
        docker = "manifest.json" in self._members
        if "index.json" in self._members and not (docker and "oci-layout" not in self._members):
            return self._layout_images()
        if docker:
            return self._docker_images()
        raise InvalidArgumentError(f"{self.name} has neither index.json nor manifest.json: it is no image archive")

    def _layout_images(self) -> list[ArchivedImage]:
        index = parse_manifest(self._read("index.json", MAX_MANIFEST), "", f"{self.name}: index.json")
        if isinstance(index, Manifest):
            raise InvalidArgumentError(f"{self.name}: index.json is no index")
        named: dict[str, list[Descriptor]] = {}
        for entry in index.manifests:
            if not is_attestation(entry):
                named.setdefault(_name_of(entry), []).append(entry)
        if not named:
            raise InvalidArgumentError(f"{self.name}: index.json lists no images")
        return _without_repeats(named)

    def _docker_images(self) -> list[ArchivedImage]:
        what = f"{self.name}: manifest.json"
        try:
            document = json.loads(self._read("manifest.json", MAX_MANIFEST))
        except (ValueError, RecursionError) as e:
            raise InvalidArgumentError(f"{what} is not valid JSON: {e}") from e
        if not isinstance(document, list) or not document:
            raise InvalidArgumentError(f"{what} is not a list of images")
        if len(document) > _MAX_IMAGES:
            raise InvalidArgumentError(f"{what} lists {len(document)} images; {_MAX_IMAGES} are the most allowed")
        return [self._docker_image(entry, what) for entry in document]

    def _docker_image(self, entry: Any, what: str) -> ArchivedImage:
        match entry:
            case {"Config": str() as config, "Layers": [*_] | None as layers}:
                layers, tags = _texts(layers), _texts(entry.get("RepoTags"))
            case _:
                raise InvalidArgumentError(f"{what}: an entry lacks Config or Layers")
        if layers is None or tags is None:
            raise InvalidArgumentError(f"{what}: Layers or RepoTags is not a list of names")
        described_config, diff_ids = self._docker_config(config)
        if len(diff_ids) != len(layers):
            raise InvalidArgumentError(f"{what} lists {len(layers)} layers, and {config} {len(diff_ids)}")
        described = [self._docker_layer(name, diff_id) for name, diff_id in zip(layers, diff_ids, strict=True)]
        manifest = _oci_manifest(described_config, described)
        digest = digest_of(manifest)
        self._manifests[digest] = manifest
        index = Index((Descriptor(OCI_MANIFEST, digest, len(manifest)),))
        names = tuple(_whole(tag) for tag in tags if tag)
        return ArchivedImage(names, index, published=False)

    def _docker_config(self, name: str) -> tuple[Descriptor, tuple[str, ...]]:
        """The descriptor of a configuration, and its diff IDs. Images of one configuration have it read once."""
        member = self._member(name)
        if member not in self._configs:
            body = self._read(name, MAX_CONFIG)
            descriptor = Descriptor(OCI_CONFIG, digest_of(body), len(body))
            self._digests[descriptor.digest] = name
            self._configs[member] = descriptor, parse_config(body, f"{self.name}: {name}").diff_ids
        return self._configs[member]

    def _docker_layer(self, name: str, diff_id: str) -> Descriptor:
        """The descriptor of a layer, which docker's format does not have.

        The digest of an uncompressed layer is its diff ID, which is checked when the layer is read. A compressed layer
        is read and hashed for it, once for all images.
        """
        member = self._member(name)
        if member not in self._layers:
            start = self._piece(member, 0)
            packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
            self._layers[member] = Descriptor(packed, self._hashed(member), member.size) if packed else None
        descriptor = self._layers[member] or Descriptor(OCI_LAYER, diff_id, member.size)
        self._digests[descriptor.digest] = name
        return descriptor

    def _hashed(self, member: Member) -> str:
        found, position = new_hash(), 0
        while piece := self._piece(member, position):
            found.update(piece)
            position += len(piece)
        return written(found)

    def _read_manifest(self, digest: str) -> bytes:
        body = self._read(self._place(digest), MAX_MANIFEST)
        if (found := digest_of(body, digest)) != digest:
            raise DataLossError(f"{self.name}: the content of manifest {digest} has digest {found}")
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

    def _piece(self, member: Member, position: int) -> bytes:
        """The next bytes of a member from ``position`` on; b"" at its end."""
        wanted = min(_CHUNK, member.size - position)
        try:
            piece = os.pread(self._fd, wanted, member.offset + position)
        except OSError as e:
            raise InvalidArgumentError(f"{self.name} cannot be read: {e.strerror}") from e
        if wanted and not piece:
            raise InvalidArgumentError(f"{self.name} is damaged: it ends in the middle of a member")
        return piece

    def _member(self, name: str) -> Member:
        """The regular file at ``name``, also through a link: old tools write a layer that occurs twice as a link."""
        path: str | None = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            member = self._members.get(path) if path is not None else None
            if member is None:
                break
            if member.is_file:
                return member
            path = member.target
        raise NotFoundError(f"{self.name} has no file {name}")


@asynccontextmanager
async def open_archive(
    path: str, name: str, scratch: Callable[[], BinaryIO], limits: LayerLimits
) -> AsyncIterator[Archive]:
    """The archive at ``path``; ``name`` is its name in errors, "" for the path. Raises as :func:`plain_file`."""
    what = f"archive {name or path}"
    async with plain_file(path, what, scratch, limits) as fd:
        yield Archive(what, fd, limits)


def _name_of(entry: Descriptor) -> str:
    """The name of an entry in index.json, or its tag within the layout; "" for none."""
    name = entry.annotations.get(_NAME)
    return _whole(name) if name else entry.annotations.get(_REF_NAME, "")


def _whole(name: str) -> str:
    """A name with a tag: Docker's default tag for a name without one."""
    return name if is_whole(name) else f"{name}:latest"


def _without_repeats(named: dict[str, list[Descriptor]]) -> list[ArchivedImage]:
    """The images of a layout, each once with all its names.

    Entries of one name are manifests for several platforms. So are entries without a name if each has another platform.
    Else each is an image.
    """
    images: dict[tuple[str, ...], ArchivedImage] = {}
    for name, entries in named.items():
        platforms = {entry.platform for entry in entries}
        together = bool(name) or (None not in platforms and len(platforms) == len(entries))
        for group in [entries] if together else [[entry] for entry in entries]:
            digests = tuple(entry.digest for entry in group)
            image = images.get(digests, ArchivedImage((), Index(tuple(group)), published=True))
            images[digests] = replace(image, names=(*image.names, name) if name else image.names)
    return list(images.values())


def _texts(value: object) -> list[str] | None:
    """A list of texts, which may be null; None if it is something else."""
    if value is None:
        return []
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


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
