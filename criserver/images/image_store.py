"""The records of images: by ID, by name, and the blobs and layers that each image needs.

The database has the manifest for each image ID (the digest of the image's configuration), and the image ID for each
name. All else is read from the content store at the start, so callers see what is on disk.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog

from criserver.errors import CriError, DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from criserver.images import references
from criserver.images.content import ContentStore
from criserver.images.digests import begins_with, digits, is_digest
from criserver.images.export import Export
from criserver.images.image import Image, ImageUsage
from criserver.images.manifests import (
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Manifest,
    chain_ids,
    layers_with_diff_ids,
    parse_config,
    parse_manifest,
)
from criserver.images.name_patterns import NamePatterns
from criserver.images.suspects import Suspects
from criserver.store import Change, Store
from snapshotter import Snapshotter
from snapshotter.tasks import to_the_end

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_IMAGES = "images"
_NAMES = "image_names"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image with its manifest, and with the blobs and layers that it needs.

    ``pinned`` says whether its record pins it. The image is pinned also if a pattern matches one of its names.
    """

    image: Image
    pinned: bool
    manifest: Descriptor
    blobs: frozenset[str]
    layers: frozenset[str]


class ImageStore:
    """The records of images. Creating it drops the records of images of which a part is missing on disk.

    After an unclean boot an image is kept if only layers are missing. These are suspects: its next user unpacks them.
    """

    def __init__(self, store: Store, content: ContentStore, snapshotter: Snapshotter, suspects: Suspects) -> None:
        self._store = store
        self._content = content
        self._snapshotter = snapshotter
        self._suspects = suspects
        self._entries: dict[str, _Entry] = {}
        self._names: dict[str, str] = {}
        self._pinned_names = NamePatterns(())
        # A change is made from what the change before it has left in memory.
        self._writing = asyncio.Lock()
        self._load()

    def get(self, ref_or_id: str) -> Image | None:
        """The image with this name, ID, hexadecimal part of an ID or unambiguous beginning of it; or None.

        A text that is a name and the beginning of an ID is the name. Raises InvalidArgumentError if several IDs have
        the beginning.
        """
        if is_digest(ref_or_id):
            entry = self._entries.get(ref_or_id)
            return entry.image if entry else None
        if name := self.name_in(ref_or_id):
            return self._entries[self._names[name]].image
        start = digits(ref_or_id)
        if not start or not _HEX.issuperset(start):
            return None
        found = [entry.image for key, entry in self._entries.items() if begins_with(key, ref_or_id)]
        if len(found) > 1:
            raise InvalidArgumentError(f"{len(found)} image IDs begin with {ref_or_id}; give more digits of the ID")
        return found[0] if found else None

    def wanted(self, ref_or_id: str) -> Image:
        """As :meth:`get`, and raises NotFoundError if there is no such image."""
        image = self.get(ref_or_id)
        if image is None:
            raise NotFoundError(f"image {ref_or_id} is not on this node")
        return image

    def list(self, filter: str | None = None) -> list[Image]:  # noqa: A002 - CRI's own word
        """All images, sorted by ID; with ``filter`` those of that name, where a name without a tag means all tags."""
        if not filter:
            return [entry.image for _, entry in sorted(self._entries.items())]
        if ids := self._in_repository(filter):
            return [self._entries[image_id].image for image_id in sorted(ids)]
        image = self.get(filter)
        return [image] if image else []

    async def pin(self, ref: str, *, pinned: bool) -> Image:
        """Pin an image, or unpin it. The kubelet's garbage collection leaves pinned images alone (CRI Image.pinned).

        Raises NotFoundError, InvalidArgumentError, and FailedPreconditionError if the configuration pins an image that
        is to be unpinned.
        """
        async with self._writing:
            image = self.wanted(ref)
            if not pinned and (name := self._pinned_names.match((*image.repo_tags, *image.repo_digests))):
                raise FailedPreconditionError(
                    f"image {image.id} is pinned by the configuration: a pattern of images.pinned matches {name}; "
                    "change the pattern"
                )
            entry = replace(self._entries[image.id], pinned=pinned)

            def change() -> Image:
                self._entries[image.id] = entry
                self._name([image.id])
                return self._entries[image.id].image

            changed = await self._write(change, Change(_IMAGES, image.id, _record(entry)))
        _log.info("image pinned" if pinned else "image no longer pinned", image=image.id)
        return changed

    def pin_matching(self, patterns: Iterable[str]) -> None:
        """Pin also each image, present or future, of which a name matches one of these patterns.

        They replace the patterns of an earlier call.
        """
        self._pinned_names = NamePatterns(patterns)
        self._name(list(self._entries))

    def name_in(self, ref: str) -> str:
        """The canonical form of ``ref`` if that is the name of an image here, else ""."""
        try:
            name = str(references.parse(ref))
        except InvalidArgumentError:
            return ""
        return name if name in self._names else ""

    def named(self, name: str) -> Image | None:
        """The image with this canonical name, or None."""
        image_id = self._names.get(name)
        return self._entries[image_id].image if image_id else None

    def export(self, image_id: str, names: tuple[str, ...]) -> Export:
        """The image and its names as an export has them. Raises DataLossError, NotFoundError."""
        descriptor = self._entries[image_id].manifest
        return Export(names, descriptor, self._manifest(descriptor))

    def blobs(self, image_ids: Iterable[str] | None = None) -> set[str]:
        """The digests of the blobs that the given images need, by default all images."""
        wanted = self._entries if image_ids is None else image_ids
        return set().union(*(self._entries[image_id].blobs for image_id in wanted))

    def layers(self) -> set[str]:
        """The chain IDs of the layers that the images need."""
        return set().union(*(entry.layers for entry in self._entries.values()))

    def usages(self) -> tuple[ImageUsage, ...]:
        """What each image occupies, sorted by ID."""
        # Counted apart: the chain ID of a lowest layer is the digest of its blob if that is not compressed.
        blob_users = Counter(digest for entry in self._entries.values() for digest in entry.blobs)
        layer_users = Counter(chain_id for entry in self._entries.values() for chain_id in entry.layers)
        found = []
        for _, entry in sorted(self._entries.items()):
            blobs = {digest: self._content.size(digest) or 0 for digest in entry.blobs}
            layers = {key: layer.size for key in entry.layers if (layer := self._snapshotter.layer(key)) is not None}
            own = sum(size for digest, size in blobs.items() if blob_users[digest] == 1)
            own += sum(size for chain_id, size in layers.items() if layer_users[chain_id] == 1)
            found.append(ImageUsage(entry.image, sum(blobs.values()), sum(layers.values()), own))
        return tuple(found)

    def owners(self, digest: str) -> tuple[Image, ...]:
        """The images that need the blob with this digest, or the layer with this chain ID."""
        entries = (entry for _, entry in sorted(self._entries.items()))
        return tuple(entry.image for entry in entries if digest in entry.blobs or digest in entry.layers)

    def manifest_to_check(self, image_id: str) -> Descriptor | None:
        """The manifest of an image that has suspects or missing parts; None if there is nothing to check."""
        entry = self._entries.get(image_id)
        if entry is None:
            return None
        whole = all(self._snapshotter.layer(chain_id) is not None for chain_id in entry.layers) and all(
            self._content.size(digest) is not None for digest in entry.blobs
        )
        return None if whole and not self._suspects.concern(entry.blobs, entry.layers) else entry.manifest

    def missing(self, digests: Iterable[str]) -> dict[str, str]:
        """The images of which one of these blobs or layers is missing, by ID, with what is missing."""
        found = {}
        for image_id, entry in self._entries.items():
            for digest in digests:
                if digest in entry.blobs and self._content.size(digest) is None:
                    found[image_id] = f"blob {digest}"
                elif digest in entry.layers and self._snapshotter.layer(digest) is None:
                    found[image_id] = f"layer {digest}"
        return found

    def sources(self) -> dict[str, Descriptor]:
        """The blobs of the layers of all images, by the layers' chain IDs."""
        found: dict[str, Descriptor] = {}
        for entry in self._entries.values():
            try:
                manifest = self._manifest(entry.manifest)
                body = self._content.read(manifest.config.digest, MAX_CONFIG)
            except CriError:
                continue  # the blob is damaged, which a verification reports by its digest
            layers = layers_with_diff_ids(manifest, parse_config(body, entry.image.id))
            chain = chain_ids([diff_id for _, diff_id in layers])
            found.update((chain_id, blob) for chain_id, (blob, _) in zip(chain, layers, strict=True))
        return found

    async def record(self, manifest: Descriptor, names: Iterable[str], *, pinned: bool) -> Image:
        """Record a loaded image under ``names``. Other images lose these names."""
        async with self._writing:
            entry = self._read(manifest, pinned=pinned)
            old = self._entries.get(entry.image.id)
            if old is not None and old.pinned:
                entry = replace(entry, pinned=True)
            names = tuple(names)

            def change() -> Image:
                changed = {entry.image.id, *(self._names[name] for name in names if name in self._names)}
                self._entries[entry.image.id] = entry
                self._names.update(dict.fromkeys(names, entry.image.id))
                self._name(changed)
                return self._entries[entry.image.id].image

            return await self._write(
                change,
                Change(_IMAGES, entry.image.id, _record(entry)),
                *(Change(_NAMES, name, entry.image.id.encode()) for name in names),
            )

    async def drop(self, image_ids: Iterable[str]) -> None:
        """Delete the records of images, and their names."""
        gone = set(image_ids)
        async with self._writing:
            await self._write(partial(self._forget, gone), *self._deletion(gone))

    async def _write(self, change: Callable[[], _T], *records: Change) -> _T:
        """Write records, and then make the same change in memory: also where the caller is cancelled meanwhile.

        A cancelled caller waits for the change in memory. Until then its lease keeps the content of a new image.
        """

        async def write() -> _T:
            await self._store.write(*records)
            return change()

        return await to_the_end(asyncio.ensure_future(write()))

    def _deletion(self, image_ids: set[str]) -> tuple[Change, ...]:
        names = [name for name, image_id in self._names.items() if image_id in image_ids]
        return (*(Change(_NAMES, name, None) for name in names), *(Change(_IMAGES, key, None) for key in image_ids))

    def _forget(self, image_ids: set[str]) -> None:
        self._names = {name: image_id for name, image_id in self._names.items() if image_id not in image_ids}
        for image_id in image_ids:
            self._entries.pop(image_id, None)

    def _in_repository(self, text: str) -> set[str]:
        """The IDs of all images in the repository ``text``; empty if that has a tag or a digest."""
        try:
            repository = references.parse(text).name
        except InvalidArgumentError:
            return set()
        if "@" in text or ":" in text.rpartition("/")[2]:
            return set()
        prefixes = (f"{repository}:", f"{repository}@")
        return {image_id for name, image_id in self._names.items() if name.startswith(prefixes)}

    def _name(self, image_ids: Iterable[str]) -> None:
        """Update the names in the Image values of these images, and whether they are pinned."""
        for image_id in image_ids:
            names = sorted(name for name, owner in self._names.items() if owner == image_id)
            entry = self._entries[image_id]
            image = replace(
                entry.image,
                repo_tags=tuple(name for name in names if "@" not in name),
                repo_digests=tuple(name for name in names if "@" in name),
                pinned=entry.pinned or bool(self._pinned_names.match(names)),
            )
            self._entries[image_id] = replace(entry, image=image)

    def _load(self) -> None:
        broken = []
        for image_id, value in self._store.items(_IMAGES):
            try:
                self._entries[image_id] = self._recorded(image_id, value)
            except (CriError, ValueError, KeyError, TypeError) as e:
                broken.append(image_id)
                _log.warning("image dropped, pull it again", image=image_id, error=str(e))
        self._names = {name: value.decode() for name, value in self._store.items(_NAMES)}
        unknown = {image_id for image_id in self._names.values() if image_id not in self._entries}
        if broken or unknown:
            gone = unknown.union(broken)
            self._store.write_now(*self._deletion(gone))
            self._forget(gone)
        self._name(list(self._entries))

    def _recorded(self, image_id: str, value: bytes) -> _Entry:
        """The image of a record. Raises an error if a part of it is missing or damaged."""
        record = json.loads(value)
        found = record["manifest"]
        manifest = Descriptor(found["mediaType"], found["digest"], found["size"])
        entry = self._read(manifest, pinned=record["pinned"], mend=self._suspects.unclean)
        if entry.image.id != image_id:
            raise DataLossError(f"its manifest {manifest.digest} is of image {entry.image.id}")
        return entry

    def _read(self, descriptor: Descriptor, *, pinned: bool, mend: bool = False) -> _Entry:
        """The image with this manifest, without names, from disk. Raises an error if a part is missing.

        With ``mend`` a missing layer is no error, and becomes a suspect.
        """
        manifest = self._manifest(descriptor)
        body = self._content.read(manifest.config.digest, MAX_CONFIG)
        configuration = parse_config(body, f"configuration {manifest.config.digest}")
        layers = layers_with_diff_ids(manifest, configuration)
        needed = (manifest.config, *(layer for layer, _ in layers), *manifest.others)
        for blob in needed:
            if self._content.size(blob.digest) != blob.size:
                raise DataLossError(f"blob {blob.digest} is missing or not of {blob.size} bytes")
        chain = chain_ids([diff_id for _, diff_id in layers])
        missing = [chain_id for chain_id in chain if self._snapshotter.layer(chain_id) is None]
        if missing and not mend:
            raise NotFoundError(f"layer {missing[0]} is missing")
        self._suspects.layers.update(missing)
        image = Image(
            id=manifest.config.digest,
            repo_tags=(),
            repo_digests=(),
            size=manifest.config.size + sum(layer.size for layer in manifest.layers),
            config=configuration.process,
            chain_id=chain[-1],
            manifest=descriptor.digest,
            pinned=pinned,
        )
        blobs = (descriptor.digest, *(blob.digest for blob in needed))
        return _Entry(image, pinned, descriptor, frozenset(blobs), frozenset(chain))

    def _manifest(self, descriptor: Descriptor) -> Manifest:
        what = f"manifest {descriptor.digest}"
        body = self._content.read(descriptor.digest, MAX_MANIFEST)
        manifest = parse_manifest(body, descriptor.media_type, what)
        if not isinstance(manifest, Manifest):
            raise DataLossError(f"{what} is an index")
        return manifest


def _record(entry: _Entry) -> bytes:
    manifest = entry.manifest
    described = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": manifest.size}
    return json.dumps({"manifest": described, "pinned": entry.pinned}).encode()
