"""Garbage collection: the deletion of blobs and layers that nothing needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import structlog

from criserver.images.content import ContentStore
from criserver.images.image import FsUsage
from criserver.images.image_store import ImageStore
from criserver.images.pull import Lease
from snapshotter import Layer, SnapshotError, Snapshotter
from snapshotter.tasks import outlive

_log = structlog.get_logger(__name__)


class GarbageCollector:
    """Deletes blobs and layers that no image, no lease and no writable snapshot needs."""

    def __init__(self, images: ImageStore, content: ContentStore, snapshotter: Snapshotter) -> None:
        self._images = images
        self._content = content
        self._snapshotter = snapshotter
        self._leases: set[Lease] = set()
        self._collecting = asyncio.Lock()
        self._collections: set[asyncio.Task[FsUsage]] = set()

    async def collect(self) -> FsUsage:
        """Delete the garbage and return what was freed. It goes on to its end if the caller is cancelled."""
        task = asyncio.create_task(self._collect())
        self._collections.add(task)
        task.add_done_callback(self._collections.discard)
        return await outlive(task)

    @asynccontextmanager
    async def kept(self, lease: Lease) -> AsyncIterator[Lease]:
        """Keep what is under the lease while the block lasts. What nobody else needs at its end is deleted then:

        1. If the load has failed, all that it has brought.
        2. If it has succeeded, the blobs of the manifest that the image had before, if that was another one.
        3. The content of an image that was removed meanwhile.
        """
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._leases.remove(lease)
            if self._content.digests() - self._needed_blobs() or self._garbage_layer() is not None:
                await self.collect()

    def leased(self) -> set[str]:
        """The blobs and layers of the loads and exports under way."""
        return set().union(*(lease.blobs | lease.layers for lease in self._leases))

    async def _collect(self) -> FsUsage:
        size = inodes = 0
        stuck: set[str] = set()
        async with self._collecting:
            await self._snapshotter.delete_rest()
            await self._content.delete_rest()
            for digest in self._content.digests() - self._needed_blobs():
                # A pull may need it since the deletion of the blob before.
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
                    _log.warning("layer not removed", layer=layer.chain_id, error=str(e))
                    stuck.add(layer.chain_id)
                else:
                    size += layer.size
                    inodes += layer.inodes
        return FsUsage(size, inodes)

    def _needed_blobs(self) -> set[str]:
        return self._images.blobs().union(*(lease.blobs for lease in self._leases))

    def _garbage_layer(self, stuck: Collection[str] = ()) -> Layer | None:
        """A layer that can be deleted and is not ``stuck``: nothing needs it, and no layer is on top of it."""
        layers = self._snapshotter.layers()
        needed = self._images.layers().union(*(lease.layers for lease in self._leases))
        for snapshot in self._snapshotter.snapshots().values():
            needed.add(snapshot.chain_id)
        needed.update(layer.parent for layer in layers.values() if layer.parent)
        return next((layer for key, layer in layers.items() if key not in needed and key not in stuck), None)
