"""Verification: every blob is compared with its digest, and every layer with the blob that it came from.

One thread or process at a time does the work, at the lowest priority, so that pods are not slowed down.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from criserver.images.content import ContentStore
from criserver.images.image import Image
from criserver.images.manifests import Descriptor, compression
from criserver.images.worker_faults import worker_fault
from snapshotter import SnapshotError, Snapshotter
from snapshotter.threads import Threads, in_thread

_INTERVAL = 0.2
_NICEST = 19


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged blob (its digest) or layer (its chain ID), and the images that need it."""

    kind: str
    digest: str
    reason: str
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification has checked so far, and the damage found since the last value."""

    bytes: int = 0
    total_bytes: int = 0
    blobs: int = 0
    layers: int = 0
    damage: tuple[Damage, ...] = ()


class Verifier:
    """One verification.

    ``owners`` returns the images that need a blob or layer, ``sources`` the blobs that layers came from, by chain ID.
    Content that is removed meanwhile is not reported, and new content is not checked.
    """

    def __init__(
        self,
        content: ContentStore,
        snapshotter: Snapshotter,
        owners: Callable[[str], tuple[Image, ...]],
        sources: Callable[[], Mapping[str, Descriptor]],
    ) -> None:
        self._content = content
        self._snapshotter = snapshotter
        self._owners = owners
        self._sources = sources
        self._read = 0
        self._ended = threading.Event()

    async def run(self) -> AsyncGenerator[Verified, None]:
        """Verify. Yields the progress a few times a second and at the end.

        Raises OSError and CriError if a blob or layer cannot be checked now.
        """
        digests = sorted(self._content.digests())
        layers = list(self._snapshotter.layers())
        total = sum(self._content.size(digest) or 0 for digest in digests)
        blobs = checked = 0
        damaged = set()
        executor = Threads(1, "verify", _give_way)
        try:
            for digest in digests:
                work = asyncio.get_running_loop().run_in_executor(executor, self._blob, digest)
                while not (await asyncio.wait([work], timeout=_INTERVAL))[0]:
                    yield Verified(self._read, total, blobs, checked)
                blobs += 1
                reason = work.result()
                # It is read twice: a blob that was removed while it was read, and perhaps pulled again, is not damaged.
                if reason and await in_thread(self._blob, digest) and self._content.size(digest) is not None:
                    damaged.add(digest)
                    yield Verified(self._read, total, blobs, checked, (self._damage("blob", digest, reason),))
            sources = self._sources()
            for chain_id in layers:
                source = sources.get(chain_id)
                reason = await self._layer(chain_id, None if source is None or source.digest in damaged else source)
                checked += 1
                found = (self._damage("layer", chain_id, reason),) if reason else ()
                yield Verified(self._read, total, blobs, checked, found)
            yield Verified(self._read, total, blobs, checked)
        finally:
            self._ended.set()
            executor.shutdown(wait=False)

    def _damage(self, kind: str, digest: str, reason: str) -> Damage:
        return Damage(kind, digest, reason, self._owners(digest))

    async def _layer(self, chain_id: str, source: Descriptor | None) -> str:
        """What is wrong with a layer; "" if nothing is. ``source`` is its blob, if that can be compared with it."""
        if source is None:
            return await self._snapshotter.check_layer(chain_id)
        blob = self._content.path(source.digest)
        try:
            return await self._snapshotter.check_layer(chain_id, blob, compression(source, "its image"))
        except SnapshotError as e:
            raise worker_fault(e)(f"layer {chain_id} cannot be checked: {e}; verify again") from e

    def _blob(self, digest: str) -> str:
        """What is wrong with a blob; "" if nothing is. It runs in the thread."""
        return self._content.check(digest, self._go_on)

    def _go_on(self, length: int) -> bool:
        self._read += length
        return not self._ended.is_set()


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
