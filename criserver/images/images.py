"""The images of this node: their records, their names, and who still needs which blobs and layers.

The store has for each image ID (the digest of its configuration) the manifest, and for each name the image ID.
All else is read from the content store, at start, so that what is served is what is on disk.

An image is recorded, in one transaction, when all of it is here, and its record goes before anything of it does.
Whatever has no record and no lease of a load under way is garbage, so a crash at any point leaves nothing but
garbage, and :meth:`Images.collect` at the next start removes it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from criserver.errors import CriError, DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from criserver.images import references
from criserver.images.archive import open_archive
from criserver.images.content import ContentStore
from criserver.images.credentials import Credentials, load_docker_config
from criserver.images.export import Export, archive_of
from criserver.images.hosts import hosts_for
from criserver.images.image import FsUsage, Image, Pruned
from criserver.images.manifests import (
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Manifest,
    chain_ids,
    choose,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform
from criserver.images.policy import AcceptAll, ImagePolicy
from criserver.images.progress import LayerProgress, progress
from criserver.images.pull import Lease, Loader
from criserver.images.references import Reference
from criserver.images.settings import RegistrySettings
from criserver.images.verify import Verified, Verifier
from criserver.store import Store
from snapshotter import Layer, SnapshotError, Snapshotter
from snapshotter.tasks import outlive
from snapshotter.threads import in_thread

if TYPE_CHECKING:
    from criserver.images.registry import RegistryClient

_log = structlog.get_logger(__name__)

_IMAGES = "images"
_NAMES = "image_names"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image with its manifest, and with what it needs to be kept."""

    image: Image
    manifest: Descriptor
    blobs: frozenset[str]
    layers: frozenset[str]


class _Pull:
    """A pull under way, its lease, and how many calls wait for it."""

    def __init__(self, task: asyncio.Task[Image], lease: Lease) -> None:
        self.task = task
        self.lease = lease
        self.waiters = 0


class Images:
    """The images of a node. One for a daemon, which calls :meth:`collect` once at its start.

    Creating it drops the records of images that are no longer here as a whole.
    """

    def __init__(
        self,
        store: Store,
        content: ContentStore,
        snapshotter: Snapshotter,
        registries: RegistrySettings,
        platform: Platform,
        policy: ImagePolicy | None = None,
    ) -> None:
        self._store = store
        self._content = content
        self._snapshotter = snapshotter
        self._registries = registries
        self._policy = policy or AcceptAll()
        self._platform = platform
        self._loader = Loader(content, snapshotter, platform)
        self._entries: dict[str, _Entry] = {}
        self._names: dict[str, str] = {}
        self._leases: set[Lease] = set()
        self._downloads = asyncio.Semaphore(registries.max_downloads)
        self._pulls: dict[tuple[str, Credentials | None], _Pull] = {}
        self._collecting = asyncio.Lock()
        self._verifying = False
        self._collections: set[asyncio.Task[FsUsage]] = set()
        self._load()

    async def pull(self, ref: str, credentials: Credentials | None = None) -> Image:
        """Bring the image that ``ref`` means at its registry at this moment, and give it that name.

        The registry is asked even for what is here, as it decides who may have it. Calls with the same reference
        and credentials share one pull, which ends early when the last of them is cancelled.

        Raises InvalidArgumentError for what is malformed, NotFoundError, UnauthenticatedError,
        PermissionDeniedError, which is the policy's too, UnavailableError, DataLossError for content that is not what
        its digest says, UnimplementedError, ResourceExhaustedError, FailedPreconditionError for the node's registry
        configuration.
        """
        reference = references.parse(ref)
        key = (str(reference), credentials)
        pull = self._pulls.get(key)
        if pull is None:
            lease = Lease()
            pull = self._pulls[key] = _Pull(asyncio.create_task(self._pull(reference, credentials, lease)), lease)
            pull.task.add_done_callback(lambda _: self._forget(key, pull))
        pull.waiters += 1
        try:
            return await outlive(pull.task)
        except asyncio.CancelledError:
            if pull.waiters == 1 and not pull.task.done():
                # Whoever asks from now on starts anew and does not join a pull that is going down.
                self._forget(key, pull)
                pull.task.cancel()
                await asyncio.wait([pull.task])
            raise
        finally:
            pull.waiters -= 1

    def watch(self, ref: str, credentials: Credentials | None = None) -> Callable[[], tuple[LayerProgress, ...]]:
        """How far the pull under way with this reference and these credentials is, whenever that is called.

        Its layers, the lowest first; () before they are known, and where there is no such pull. It may be asked when
        the pull has ended, too. Raises InvalidArgumentError.
        """
        pull = self._pulls.get((str(references.parse(ref)), credentials))
        lease = pull.lease if pull else Lease()
        return lambda: progress(lease, self._content, self._snapshotter)

    async def import_archive(self, path: str, *, name: str = "", pinned: bool = False) -> list[Image]:
        """Bring the images of an archive, an OCI layout or a ``docker save``, under the names that it gives them.

        ``pinned`` images are kept from the kubelet's garbage collection. One without a name has its ID only. All
        are here, or none where an error is raised: NotFoundError, InvalidArgumentError, DataLossError,
        UnimplementedError, ResourceExhaustedError.
        """
        with open_archive(path, name) as archive:
            async with self._lease(Lease()) as lease:
                loaded: list[tuple[Descriptor, list[str]]] = []
                for archived in await archive.images():
                    target = choose(archived.index, self._platform, archive.name)
                    names = [str(name) for name in archived.names]
                    if archived.published:
                        names += [f"{name.name}@{target.digest}" for name in archived.names]
                    loaded.append((await self._loader.load(archive, target, lease), names))
                ids = {self._record(descriptor, names, pinned=pinned).id: None for descriptor, names in loaded}
                images = [self._entries[image_id].image for image_id in ids]
        _log.info("archive imported", path=path, images=list(ids))
        return images

    async def export(self, refs: Sequence[str]) -> AsyncIterator[bytes]:
        """The pieces of a tar file of images, by name or ID; see :mod:`criserver.images.export`.

        An image is exported under the names that it is given by, one that is given by its ID under all that it has.
        None of them goes while it is read. Raises NotFoundError, InvalidArgumentError, DataLossError.
        """
        chosen: dict[str, list[str]] = {}
        for ref in refs:
            image = self.wanted(ref)
            given = self._name_in(ref)
            chosen.setdefault(image.id, []).extend([given] if given else image.repo_tags or image.repo_digests)
        lease = Lease(set().union(*(self._entries[image_id].blobs for image_id in chosen)))
        async with self._lease(lease):
            exports = [self._export(image_id, tuple(dict.fromkeys(names))) for image_id, names in chosen.items()]
            pieces = archive_of(exports, self._content)
            while (piece := await in_thread(next, pieces, None)) is not None:
                yield piece

    def get(self, ref_or_id: str) -> Image | None:
        """The image by its name, its ID, the ID's hexadecimal part or an unambiguous beginning of it; or None.

        A name goes before the beginning of an ID. Raises InvalidArgumentError where several IDs begin so.
        """
        if references.is_digest(ref_or_id):
            entry = self._entries.get(ref_or_id)
            return entry.image if entry else None
        if name := self._name_in(ref_or_id):
            return self._entries[self._names[name]].image
        start = ref_or_id.removeprefix("sha256:")
        if not start or not _HEX.issuperset(start):
            return None
        found = [entry.image for key, entry in self._entries.items() if key.startswith(f"sha256:{start}")]
        if len(found) > 1:
            raise InvalidArgumentError(f"image ID {ref_or_id} is the beginning of {len(found)} IDs; give more of it")
        return found[0] if found else None

    def wanted(self, ref_or_id: str) -> Image:
        """As :meth:`get`, for an image that has to be here. Raises NotFoundError, InvalidArgumentError."""
        image = self.get(ref_or_id)
        if image is None:
            raise NotFoundError(f"image {ref_or_id} is not on this node")
        return image

    def list(self, filter: str | None = None) -> list[Image]:  # noqa: A002 - CRI's own word
        """All images by ID; with ``filter`` those that it names, a name without tag and digest meaning all tags."""
        if not filter:
            return [entry.image for _, entry in sorted(self._entries.items())]
        if ids := self._in_repository(filter):
            return [self._entries[image_id].image for image_id in sorted(ids)]
        image = self.get(filter)
        return [image] if image else []

    def pin(self, ref: str, *, pinned: bool) -> Image:
        """Keep an image from garbage collection, the kubelet's too (CRI Image.pinned), or no more.

        Raises NotFoundError, InvalidArgumentError.
        """
        image = self.wanted(ref)
        record = json.loads(self._store.get(_IMAGES, image.id) or b"{}")
        self._store.put(_IMAGES, image.id, json.dumps({**record, "pinned": pinned}).encode())
        image = replace(image, pinned=pinned)
        self._entries[image.id] = replace(self._entries[image.id], image=image)
        _log.info("image pinned" if pinned else "image no longer pinned", image=image.id)
        return image

    def snapshots_of(self, image: Image) -> int:
        """How many writable snapshots stand on the image's topmost layer."""
        return sum(s.chain_id == image.chain_id for s in self._snapshotter.snapshots().values())

    async def remove(self, ref: str) -> None:
        """Remove the image that ``ref`` means, by name or ID, with all its names (CRI RemoveImage).

        An unknown image is no error, and neither is a pinned one: whoever names it means it. Its content goes too,
        except for what others need: layers that containers stand on stay until :meth:`collect` finds them free.
        """
        image = self.get(ref)
        if image is None:
            return
        self._drop([image.id])
        _log.info("image removed", image=image.id, names=[*image.repo_tags, *image.repo_digests])
        await self.collect()

    async def prune(self, *, unused: bool = False, used: Collection[str] = ()) -> Pruned:
        """Remove what nobody needs; with ``unused`` also images that no snapshot stands on and nobody has pinned.

        ``used`` are the IDs of images to be kept although no snapshot stands on them yet.
        """
        gone: list[Image] = []
        if unused:
            standing = {snapshot.chain_id for snapshot in self._snapshotter.snapshots().values()}
            gone = [
                image
                for image in self.list()
                if not image.pinned and image.id not in used and image.chain_id not in standing
            ]
            self._drop([image.id for image in gone])
        freed = await self.collect()
        _log.info("images pruned", images=[image.id for image in gone], bytes=freed.bytes)
        return Pruned(tuple(gone), freed)

    async def verify(self) -> AsyncIterator[Verified]:
        """Read all blobs and look at all layers, one at a time; what was found, again and again until the end.

        Raises FailedPreconditionError while another one is under way: it would only be slower.
        """
        if self._verifying:
            raise FailedPreconditionError("the images are being verified already; wait for it, or end that one")
        self._verifying = True
        try:
            verifier = Verifier(self._content, self._snapshotter, self._owners, self._sources)
            async with aclosing(verifier.run()) as found:
                async for verified in found:
                    yield verified
        finally:
            self._verifying = False

    async def collect(self) -> FsUsage:
        """Delete blobs and layers that no image, no load under way and no writable snapshot needs.

        To be called at start, and when a snapshot is gone: the image that it stood on may have been removed before
        it. Goes on to its end where the caller is cancelled. Returns what was freed.
        """
        task = asyncio.create_task(self._collect())
        self._collections.add(task)
        task.add_done_callback(self._collections.discard)
        return await outlive(task)

    async def _collect(self) -> FsUsage:
        size = inodes = 0
        stuck: set[str] = set()
        async with self._collecting:
            for digest in self._content.digests() - self._needed_blobs():
                # Others may have come to need it while the one before was deleted.
                if digest in self._needed_blobs():
                    continue
                try:
                    size += await self._content.delete(digest)
                except OSError as e:
                    _log.warning("blob not removed", digest=digest, error=str(e))
                else:
                    inodes += 1
            while (layer := self._garbage_layer(stuck)) is not None:
                try:
                    await self._snapshotter.remove_layer(layer.chain_id)
                except (SnapshotError, OSError) as e:
                    # The others go all the same.
                    _log.warning("layer not removed", layer=layer.chain_id, error=str(e))
                    stuck.add(layer.chain_id)
                else:
                    size += layer.size
                    inodes += layer.inodes
        return FsUsage(size, inodes)

    def fs_usage(self) -> FsUsage:
        """What images occupy at this moment, from counters; layers that are still being unpacked are not in it."""
        size, inodes = self._content.usage()
        for layer in self._snapshotter.layers().values():
            size += layer.size
            inodes += layer.inodes
        return FsUsage(size, inodes)

    def _name_in(self, ref: str) -> str:
        """The name of an image here that ``ref`` is, in its canonical form; "" where it is none."""
        try:
            name = str(references.parse(ref))
        except InvalidArgumentError:
            return ""
        return name if name in self._names else ""

    def _owners(self, digest: str) -> tuple[Image, ...]:
        """The images that have the blob with this digest, or the layer with this chain ID."""
        entries = (entry for _, entry in sorted(self._entries.items()))
        return tuple(entry.image for entry in entries if digest in entry.blobs or digest in entry.layers)

    def _sources(self) -> dict[str, Descriptor]:
        """The blobs of the layers of all images, by the layers' chain IDs."""
        found: dict[str, Descriptor] = {}
        for entry in self._entries.values():
            try:
                manifest = self._manifest(entry.manifest)
                body = self._content.read(manifest.config.digest, MAX_CONFIG)
            except CriError:
                continue  # it is damaged, which is told of by its digest
            chain = chain_ids(parse_config(body, entry.image.id).diff_ids)
            found.update(zip(chain, manifest.layers, strict=True))
        return found

    def _export(self, image_id: str, names: tuple[str, ...]) -> Export:
        descriptor = self._entries[image_id].manifest
        return Export(names, descriptor, self._manifest(descriptor))

    def _in_repository(self, text: str) -> set[str]:
        """The IDs of all images in the repository that ``text`` names without tag and digest."""
        try:
            repository = references.parse(text).name
        except InvalidArgumentError:
            return set()
        if "@" in text or ":" in text.rpartition("/")[2]:
            return set()
        prefixes = (f"{repository}:", f"{repository}@")
        return {image_id for name, image_id in self._names.items() if name.startswith(prefixes)}

    async def _pull(self, reference: Reference, credentials: Credentials | None, lease: Lease) -> Image:
        from criserver.images.auth import Keyring  # with aiohttp: see transport
        from criserver.images.registry import RegistryClient

        registries = self._registries
        hosts = hosts_for(reference.domain, registries.config_path)
        file = load_docker_config(registries.auth_file) if registries.auth_file else None
        keyring = Keyring(reference, credentials, file)
        async with self._lease(lease):
            async with RegistryClient(
                reference, hosts, keyring, self._downloads, registries.progress_timeout
            ) as client:
                if image := await self._unchanged(client, reference):
                    return image
                target = await client.resolve()
                await self._policy.check(reference, target)
                descriptor = await self._loader.load(client, target, lease)
            names = [str(reference), f"{reference.name}@{target.digest}"]
            image = self._record(descriptor, names, pinned=False)
        _log.info("image pulled", reference=str(reference), image=image.id, size=image.size)
        return image

    async def _unchanged(self, client: RegistryClient, reference: Reference) -> Image | None:
        """The image that has the name already, where that means the same at its registry at this moment."""
        if str(reference) not in self._names or (target := await client.peek()) is None:
            return None
        await self._policy.check(reference, target)
        image_id = self._names.get(str(reference))
        if image_id is None or image_id != self._names.get(f"{reference.name}@{target.digest}"):
            return None
        _log.info("image is as it was", reference=str(reference), image=image_id)
        return self._entries[image_id].image

    def _forget(self, key: tuple[str, Credentials | None], pull: _Pull) -> None:
        if self._pulls.get(key) is pull:
            del self._pulls[key]

    @asynccontextmanager
    async def _lease(self, lease: Lease) -> AsyncIterator[Lease]:
        """Protection for what is brought or read; what nobody else owns by its end is deleted then.

        That is all where a load fails, the blobs of another manifest that an image came with before where it
        succeeds, and what belonged to an image that was removed meanwhile.
        """
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._leases.remove(lease)
            if self._content.digests() - self._needed_blobs() or self._garbage_layer() is not None:
                await self.collect()

    def _record(self, manifest: Descriptor, names: Iterable[str], *, pinned: bool) -> Image:
        """Make what was loaded an image and give it ``names``, which other images lose."""
        entry = self._read(manifest, pinned=pinned)
        old = self._entries.get(entry.image.id)
        if old is not None and old.image.pinned:
            entry = replace(entry, image=replace(entry.image, pinned=True))
        record = {
            "manifest": {"mediaType": manifest.media_type, "digest": manifest.digest, "size": manifest.size},
            "pinned": entry.image.pinned,
        }
        names = tuple(names)
        with self._store.transaction():
            self._store.put(_IMAGES, entry.image.id, json.dumps(record).encode())
            for name in names:
                self._store.put(_NAMES, name, entry.image.id.encode())
        changed = {entry.image.id, *(self._names[name] for name in names if name in self._names)}
        self._entries[entry.image.id] = entry
        self._names.update(dict.fromkeys(names, entry.image.id))
        self._name(changed)
        return self._entries[entry.image.id].image

    def _drop(self, image_ids: Iterable[str]) -> None:
        """Forget images and their names."""
        gone = set(image_ids)
        names = [name for name, image_id in self._names.items() if image_id in gone]
        with self._store.transaction():
            for name in names:
                self._store.delete(_NAMES, name)
            for image_id in gone:
                self._store.delete(_IMAGES, image_id)
        for name in names:
            del self._names[name]
        for image_id in gone:
            self._entries.pop(image_id, None)

    def _name(self, image_ids: Iterable[str]) -> None:
        """Bring the names that images show up to date."""
        for image_id in image_ids:
            names = sorted(name for name, owner in self._names.items() if owner == image_id)
            entry = self._entries[image_id]
            image = replace(
                entry.image,
                repo_tags=tuple(name for name in names if "@" not in name),
                repo_digests=tuple(name for name in names if "@" in name),
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
            self._drop(unknown.union(broken))
        self._name(list(self._entries))

    def _recorded(self, image_id: str, value: bytes) -> _Entry:
        """The image of a record. Raises where anything of it is missing or damaged."""
        record = json.loads(value)
        found = record["manifest"]
        manifest = Descriptor(found["mediaType"], found["digest"], found["size"])
        entry = self._read(manifest, pinned=record["pinned"])
        if entry.image.id != image_id:
            raise DataLossError(f"its manifest {manifest.digest} is of image {entry.image.id}")
        return entry

    def _read(self, descriptor: Descriptor, *, pinned: bool) -> _Entry:
        """The image with this manifest, without names, from what is on disk. Raises where a part is missing."""
        manifest = self._manifest(descriptor)
        for blob in (manifest.config, *manifest.layers):
            if self._content.size(blob.digest) != blob.size:
                raise DataLossError(f"blob {blob.digest} is missing or not of {blob.size} bytes")
        body = self._content.read(manifest.config.digest, MAX_CONFIG)
        configuration = parse_config(body, f"configuration {manifest.config.digest}")
        chain = chain_ids(configuration.diff_ids)
        for chain_id in chain:
            if self._snapshotter.layer(chain_id) is None:
                raise NotFoundError(f"layer {chain_id} is missing")
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
        blobs = (descriptor.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers))
        return _Entry(image, descriptor, frozenset(blobs), frozenset(chain))

    def _manifest(self, descriptor: Descriptor) -> Manifest:
        what = f"manifest {descriptor.digest}"
        body = self._content.read(descriptor.digest, MAX_MANIFEST)
        manifest = parse_manifest(body, descriptor.media_type, what)
        if not isinstance(manifest, Manifest):
            raise DataLossError(f"{what} is an index")
        return manifest

    def _needed_blobs(self) -> set[str]:
        return set().union(*(e.blobs for e in self._entries.values()), *(lease.blobs for lease in self._leases))

    def _garbage_layer(self, stuck: Collection[str] = ()) -> Layer | None:
        """A layer that can go and is not ``stuck``: nobody needs it, and no layer stands on it."""
        layers = self._snapshotter.layers()
        needed: set[str] = set().union(
            *(e.layers for e in self._entries.values()), *(lease.layers for lease in self._leases)
        )
        for snapshot in self._snapshotter.snapshots().values():
            needed.add(snapshot.chain_id)
        needed.update(layer.parent for layer in layers.values() if layer.parent)
        return next((layer for key, layer in layers.items() if key not in needed and key not in stuck), None)
