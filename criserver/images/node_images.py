"""The images of this node: pulled, imported, exported, verified and removed.

1. An image is recorded (see criserver.images.image_store), in one transaction, when all of it is here. A removal
   deletes the record first, and the content after that.
2. Content that has no record and no lease of a load under way is garbage. So a daemon that dies at any moment leaves
   nothing but garbage, and :meth:`Images.collect` removes that at the next start (criserver.images.garbage).
3. After a power cut :meth:`Images.checked` checks what the cut may have damaged (criserver.images.suspects).
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from criserver import logs
from criserver.errors import CriError, FailedPreconditionError, NotFoundError
from criserver.images import go_json, references
from criserver.images.archive import open_archive
from criserver.images.archive_import import load_images
from criserver.images.archive_names import Naming
from criserver.images.content import ContentStore
from criserver.images.credentials import Credentials, node_credentials
from criserver.images.export import archive_of
from criserver.images.garbage import GarbageCollector
from criserver.images.hosts import hosts_for
from criserver.images.image import FsUsage, Image, ImageUsage, LeftOut, Pruned
from criserver.images.image_store import ImageStore
from criserver.images.lookups import Lookups
from criserver.images.platforms import Platform
from criserver.images.policy import AcceptAll, ImagePolicy
from criserver.images.progress import LayerProgress, progress
from criserver.images.pull import Lease, Loader, NoSource
from criserver.images.references import Reference
from criserver.images.registry_settings import RegistrySettings
from criserver.images.suspects import Suspects
from criserver.images.verify import Verified, Verifier
from criserver.store import Store
from criserver.telemetry import families, operations
from snapshotter import Snapshotter
from snapshotter.shared_task import SharedTasks
from snapshotter.threads import in_thread

if TYPE_CHECKING:
    from criserver.images.registry_client import RegistryClient

_log = structlog.get_logger(__name__)

# Bytes of a configuration that is shown. JSON may make an answer of it that is three times as large.
_MAX_SHOWN = 1 << 20


class Images:
    """The images of a node. A daemon has one, and calls :meth:`collect` once at its start.

    Creating it drops the records of images of which a part is missing on disk. ``note`` is the file of the
    :mod:`~criserver.images.sync_note`. ``pinned`` are the patterns of :meth:`pin_matching`.
    """

    def __init__(
        self,
        store: Store,
        content: ContentStore,
        snapshotter: Snapshotter,
        registries: RegistrySettings,
        platform: Platform,
        policy: ImagePolicy | None = None,
        note: str = "",
        pinned: Collection[str] = (),
    ) -> None:
        self._suspects = Suspects(content, snapshotter, note)
        self._images = ImageStore(store, content, snapshotter, self._suspects)
        self._garbage = GarbageCollector(self._images, content, snapshotter)
        self._content = content
        self._snapshotter = snapshotter
        self._policy = policy or AcceptAll()
        self._platform = platform
        self._loader = Loader(content, snapshotter, platform, self._suspects)
        self.configure(registries)
        self.pin_matching(pinned)
        self._pulls: SharedTasks[tuple[str, Credentials | None], Lease, Image] = SharedTasks()
        self._lookups = Lookups()
        self._verifying = False

    def configure(self, registries: RegistrySettings) -> None:
        """Take over settings for the pulls that begin from now on."""
        self._registries = registries
        self._downloads = asyncio.Semaphore(registries.max_downloads)

    def pin_matching(self, patterns: Collection[str]) -> None:
        """See :meth:`ImageStore.pin_matching`."""
        self._images.pin_matching(patterns)

    async def pull(self, ref: str, credentials: Credentials | None = None) -> Image:
        """Pull the image that ``ref`` means at its registry now, and give it that name.

        1. The registry is asked also for an image that is here, as it decides who may have the image.
        2. Calls with the same reference and credentials share one pull. When the last of them is cancelled, the pull is
           cancelled too.

        Raises InvalidArgumentError for malformed references and content, NotFoundError, UnauthenticatedError,
        PermissionDeniedError (also from the policy), SignatureError, UnavailableError, DataLossError for content with
        another digest, UnimplementedError, ResourceExhaustedError, FailedPreconditionError for the node's registry
        configuration.
        """
        reference = references.parse(ref)
        lease = Lease()
        return await self._pulls.run(
            (str(reference), credentials), lease, lambda: self._counted_pull(reference, credentials, lease)
        )

    def watch(self, ref: str, credentials: Credentials | None = None) -> Callable[[], tuple[LayerProgress, ...]]:
        """A function that returns how far the pull with this reference and these credentials is.

        It returns the pull's layers, the lowest first, and () before they are known or if there is no such pull. It may
        be called after the end of the pull too. Raises InvalidArgumentError.
        """
        lease = self._pulls.notes.get((str(references.parse(ref)), credentials), Lease())
        return lambda: progress(lease, self._content, self._snapshotter)

    async def import_archive(
        self,
        path: str,
        *,
        name: str = "",
        file: str | None = None,
        given: str = "",
        pinned: bool = False,
        left_out: list[LeftOut] | None = None,
    ) -> list[Image]:
        """Add the images of an archive, an OCI layout or a ``docker save``, compressed or not.

        1. ``name`` is the archive's name in errors. ``file``, by default the same, and ``given`` are what
           :class:`Naming` makes names of.
        2. What cannot be an image of this node is left out, and appended to ``left_out``: see :func:`load_images`.
        3. The kubelet's garbage collection leaves ``pinned`` images alone.
        4. An image without a name has its ID only.

        If an error is raised, no image is added: NotFoundError, InvalidArgumentError, DataLossError,
        UnimplementedError, ResourceExhaustedError.
        """
        naming = Naming(name or path if file is None else file, given)
        limits = self._snapshotter.limits
        async with open_archive(path, name, self._content.scratch, limits) as archive, self._kept(Lease()) as lease:
            loaded, wrong = await load_images(archive, naming, self._loader, self._platform, lease)
            ids = {(await self._images.record(found, names, pinned=pinned)).id: None for found, names in loaded}
            images = [self._images.wanted(image_id) for image_id in ids]
        _log.info("archive imported", path=path, images=list(ids), left_out=[left.what for left in wrong])
        if left_out is not None:
            left_out += wrong
        return images

    async def export(self, refs: Sequence[str]) -> AsyncIterator[bytes]:
        """The pieces of a tar file with the images ``refs``, names or IDs; see :mod:`criserver.images.export`.

        An image is exported under the names in ``refs``. An image that is given by its ID is exported under all its
        names. Its blobs are not deleted meanwhile. Raises NotFoundError, InvalidArgumentError, DataLossError.
        """
        chosen: dict[str, list[str]] = {}
        for ref in refs:
            image = self._images.wanted(ref)
            given = self._images.name_in(ref)
            chosen.setdefault(image.id, []).extend([given] if given else image.repo_tags or image.repo_digests)
        lease = Lease(self._images.blobs(chosen))
        async with self._kept(lease):
            for image_id in chosen:
                await self.checked(self._images.wanted(image_id))
            exports = [self._images.export(key, tuple(dict.fromkeys(names))) for key, names in chosen.items()]
            pieces = archive_of(exports, self._content)
            while (piece := await in_thread(next, pieces, None)) is not None:
                yield piece

    def get(self, ref_or_id: str) -> Image | None:
        """See :meth:`ImageStore.get`."""
        return self._images.get(ref_or_id)

    def wanted(self, ref_or_id: str) -> Image:
        """See :meth:`ImageStore.wanted`."""
        return self._images.wanted(ref_or_id)

    def list(self, filter: str | None = None) -> list[Image]:  # noqa: A002 - CRI's own word
        """See :meth:`ImageStore.list`."""
        return self._images.list(filter)

    def configuration(self, image: Image) -> dict[str, Any]:
        """The document of the image's configuration, with all its fields. Blocks.

        Raises NotFoundError, DataLossError, OSError, and ResourceExhaustedError for a document that is large.
        """
        return go_json.parse(self._content.read(image.id, _MAX_SHOWN), f"configuration {image.id}")

    async def checked(self, image: Image) -> None:
        """Check what an unclean boot may have damaged of an image, and mend it. To be called before the image is used.

        Damaged layers are unpacked anew from their blobs. If a blob is damaged, the image is dropped, so that it is
        pulled again: raises NotFoundError.
        """
        manifest = self._images.manifest_to_check(image.id)
        if manifest is None:
            return
        try:
            async with self._kept(Lease()) as lease:
                # It is here, so its platform was right. Its configuration may name another: see manifests.is_for.
                target = replace(manifest, platform=self._platform)
                await self._loader.load(NoSource(f"image {image.id}"), target, lease)
        except CriError as e:
            if self._images.get(image.id) is not None:
                raise
            raise NotFoundError(f"image {image.id} was damaged by an unclean boot of the node; pull it again") from e

    async def check_suspects(self) -> None:
        """Check all images that an unclean boot may have damaged, one at a time.

        What cannot be checked now is checked before its first use.
        """
        for image in self._images.list():
            try:
                await self.checked(image)
            except (CriError, OSError) as e:
                _log.warning("image not usable after an unclean boot", image=image.id, error=str(e))
        await self.sync()

    async def sync(self) -> None:
        """Sync blobs and layers to disk if there are new ones, so that a power cut cannot damage them."""
        self._suspects.forget_gone(self._images.layers())
        try:
            await self._suspects.sync()
        except OSError as e:
            _log.warning("new images are not synced to disk, a power cut may damage them", error=str(e))

    async def pin(self, ref: str, *, pinned: bool) -> Image:
        """See :meth:`ImageStore.pin`."""
        return await self._images.pin(ref, pinned=pinned)

    def snapshots_of(self, image: Image) -> int:
        """How many writable snapshots are on top of the image's topmost layer."""
        return sum(s.chain_id == image.chain_id for s in self._snapshotter.snapshots().values())

    async def remove(self, ref: str) -> None:
        """Remove the image ``ref``, a name or an ID, with all its names (CRI RemoveImage).

        1. An unknown image is no error.
        2. A pinned image is removed too, as the caller has named it.
        3. Its blobs and layers are deleted, except for those that other images need. Layers under containers are
           deleted by the :meth:`collect` after the containers are gone.
        """
        image = self._images.get(ref)
        if image is None:
            return
        await self._drop([image.id])
        _log.info("image removed", image=image.id, names=[*image.repo_tags, *image.repo_digests])

    async def prune(self, *, unused: bool = False, used: Collection[str] = ()) -> Pruned:
        """Delete garbage; with ``unused`` also images that have no snapshot and are not pinned.

        ``used`` are the IDs of images that are kept although they may have no snapshot yet.
        """
        gone = self.unused(used) if unused else ()
        freed = await self._drop([image.id for image in gone])
        _log.info("images pruned", images=[image.id for image in gone], bytes=freed.bytes)
        return Pruned(gone, freed)

    def unused(self, used: Collection[str]) -> tuple[Image, ...]:
        """The images that :meth:`prune` would remove as unused."""
        standing = {snapshot.chain_id for snapshot in self._snapshotter.snapshots().values()}
        return tuple(
            image
            for image in self._images.list()
            if not image.pinned and image.id not in used and image.chain_id not in standing
        )

    async def verify(self) -> AsyncIterator[Verified]:
        """Verify all blobs and layers, one at a time. Yields the progress and the damage that was found.

        Raises FailedPreconditionError while another verification is under way: both would only be slower.
        """
        if self._verifying:
            raise FailedPreconditionError(
                "another verification of the images is under way already; wait for its end, or cancel it"
            )
        self._verifying = True
        try:
            verifier = Verifier(self._content, self._snapshotter, self._images.owners, self._images.sources)
            async with aclosing(verifier.run()) as found:
                async for verified in found:
                    yield verified
        finally:
            self._verifying = False

    async def collect(self) -> FsUsage:
        """Delete blobs and layers that no image, no load under way and no writable snapshot needs.

        To be called at the start, and after the removal of a snapshot, whose image may have been removed before. It
        goes on to its end if the caller is cancelled. Returns what was freed.
        """
        return await self._garbage.collect()

    def usages(self) -> tuple[ImageUsage, ...]:
        """See :meth:`ImageStore.usages`."""
        return self._images.usages()

    def blob_bytes(self) -> int:
        """What all blobs occupy, in bytes."""
        return self._content.usage()[0]

    def fs_usage(self) -> FsUsage:
        """What images occupy now, from counters, without the layers that are still being unpacked."""
        size, inodes = self._content.usage()
        for layer in self._snapshotter.layers().values():
            size += layer.size
            inodes += layer.inodes
        return FsUsage(size, inodes)

    @asynccontextmanager
    async def _kept(self, lease: Lease) -> AsyncIterator[Lease]:
        """As :meth:`GarbageCollector.kept`. At its end, images are dropped of which a damaged part was not replaced.

        If it is cancelled, none is dropped, and the next user of such an image goes on with it.
        """
        try:
            async with self._garbage.kept(lease):
                yield lease
        except Exception:
            await self._drop_damaged()
            raise
        await self._drop_damaged()

    async def _drop_damaged(self) -> None:
        # A load may still bring blobs and layers that its lease keeps.
        if broken := self._images.missing(self._suspects.damaged - self._garbage.leased()):
            for image_id, what in broken.items():
                _log.warning("image dropped, pull it again", image=image_id, error=f"{what} was damaged")
            await self._drop(broken)

    async def _drop(self, image_ids: Iterable[str]) -> FsUsage:
        """Delete records of images, then garbage. Returns what was freed. It is all done if the caller is cancelled."""
        try:
            await self._images.drop(image_ids)
        finally:
            freed = await self.collect()
        return freed

    async def _is_sound(self, image: Image) -> bool:
        """Whether an image can be used; see :meth:`checked`."""
        try:
            await self.checked(image)
        except NotFoundError:
            return False
        return True

    async def _counted_pull(self, reference: Reference, credentials: Credentials | None, lease: Lease) -> Image:
        result = "failed"
        with operations.PULL.timed(reference.domain):
            try:
                image, is_new = await self._pull(reference, credentials, lease)
                result = "pulled" if is_new else "unchanged"
            except asyncio.CancelledError:
                result = "cancelled"
                raise
            finally:
                families.PULLS.add(1, reference.domain, result)
        return image

    async def _pull(self, reference: Reference, credentials: Credentials | None, lease: Lease) -> tuple[Image, bool]:
        """The image, and whether it is new under this name."""
        # In a thread: the import takes a tenth of a second.
        await asyncio.to_thread(importlib.import_module, "criserver.images.registry_client")
        from criserver.images.auth import Keyring  # with aiohttp: see transport
        from criserver.images.registry_client import RegistryClient

        registries = self._registries
        hosts = hosts_for(reference.domain, registries.config_path)
        file = node_credentials(registries.auth_file)
        keyring = Keyring(reference, credentials, file)
        async with self._kept(lease):
            async with RegistryClient(
                reference,
                hosts,
                keyring,
                self._downloads,
                registries.progress_timeout,
                self._platform,
                self._lookups,
            ) as client:
                if (image := await self._unchanged(client, reference)) and await self._is_sound(image):
                    return image, False
                with operations.RESOLVE.timed():
                    target = await client.resolve()
                await self._policy.check(reference, target)
                descriptor = await self._loader.load(client, target, lease)
            names = [str(reference), f"{reference.name}@{target.digest}"]
            image = await self._images.record(descriptor, names, pinned=False)
        _log.info("image pulled", reference=str(reference), image=image.id, size=image.size, seconds=logs.elapsed())
        return image, True

    async def _unchanged(self, client: RegistryClient, reference: Reference) -> Image | None:
        """The image that has this name here, if the name means the same image at the registry now."""
        if not self._images.name_in(str(reference)) or (target := await client.peek()) is None:
            return None
        await self._policy.check(reference, target)
        image = self._images.named(str(reference))
        if image is None or image != self._images.named(f"{reference.name}@{target.digest}"):
            return None
        _log.info("image is up to date", reference=str(reference), image=image.id)
        return image
