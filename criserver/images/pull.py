"""From a source of blobs, a registry or an archive, to verified content and unpacked layers.

Nothing is recorded here: what a load has brought belongs to its lease until an image owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from criserver.errors import CriError, DataLossError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from criserver.images.content import ContentStore, Watcher
from criserver.images.manifests import (
    MAX_CONFIG,
    MAX_MANIFEST,
    Configuration,
    Descriptor,
    Manifest,
    chain_ids,
    check_layers,
    choose,
    compression,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform, runs_on
from snapshotter import Arrival, DiffMismatchError, LayerError, LimitError, SnapshotError, Snapshotter

_DOWNLOADS = 3
_MAX_NESTING = 3
_LIMITED = "the configuration has this limit in [images]"
# Seconds after which a blob is unpacked while it arrives. One that is here sooner would only be held up by that: the
# processors are what limits it. One that takes longer loses nothing, as its worker catches up.
_SOON = 0.5


class BlobSource(Protocol):
    """Where blobs come from.

    ``name`` says it in errors. Two sources with the same ``origin`` deliver the same blob for a digest, so one
    waits for the other instead of fetching it again.
    """

    name: str
    origin: str

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index, checked against its digest."""

    async def blob(self, descriptor: Descriptor, content: ContentStore, watcher: Watcher | None = None) -> None:
        """Bring a blob into ``content``, checked against its size and digest; ``watcher`` sees it come."""


@dataclass(slots=True, eq=False)
class Lease:
    """What is in use although no image owns it yet; garbage collection leaves it alone.

    ``plan`` has the layers of the image that is being loaded, once they are known: blob and chain ID.
    """

    blobs: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    plan: tuple[tuple[Descriptor, str], ...] = ()


class Loader:
    """Loads images into a content store and a snapshotter. One for a daemon: concurrent loads share work by it."""

    def __init__(self, content: ContentStore, snapshotter: Snapshotter, platform: Platform) -> None:
        self._content = content
        self._snapshotter = snapshotter
        self._platform = platform
        self._locks: dict[tuple[str, str], _Lock] = {}

    async def load(self, source: BlobSource, target: Descriptor, lease: Lease) -> Descriptor:
        """Bring the image that ``target``, a manifest or an index, means on this platform; return its manifest.

        Blobs are fetched a few at a time, and layers are unpacked while their blobs arrive where that takes long, but
        committed only when those are whole and have the right digests. What is here already is not fetched or unpacked
        again. Everything is put under ``lease`` before it is looked for.
        """
        descriptor, manifest = await self._manifest(source, target, lease)
        what = f"{source.name}: manifest {descriptor.digest}"
        most = self._snapshotter.limits.max_layers
        if len(manifest.layers) > most:
            raise ResourceExhaustedError(
                f"{what} has {len(manifest.layers)} layers, more than {most} (max_layers); {_LIMITED}"
            )
        lease.blobs.add(manifest.config.digest)
        lease.blobs.update(layer.digest for layer in manifest.layers)
        configuration = await self._configuration(source, manifest)
        check_layers(manifest, configuration, what)
        if not runs_on(configuration.platform, self._platform):
            raise NotFoundError(f"{source.name} is for {configuration.platform}; this node runs {self._platform}")
        chain = chain_ids(configuration.diff_ids)
        lease.layers.update(chain)
        lease.plan = tuple(zip(manifest.layers, chain, strict=True))
        slots = asyncio.Semaphore(_DOWNLOADS)
        await _all(
            self._layer(source, layer, diff_id, chain_id, parent, slots)
            for layer, diff_id, chain_id, parent in zip(
                manifest.layers, configuration.diff_ids, chain, (None, *chain), strict=False
            )
        )
        return descriptor

    async def _manifest(self, source: BlobSource, target: Descriptor, lease: Lease) -> tuple[Descriptor, Manifest]:
        descriptor = target
        for _ in range(_MAX_NESTING):
            lease.blobs.add(descriptor.digest)
            if self._content.size(descriptor.digest) is None:
                body = await source.manifest(descriptor)
            else:
                body = self._content.read(descriptor.digest, MAX_MANIFEST)
            what = f"{source.name}: manifest {descriptor.digest}"
            parsed = parse_manifest(body, descriptor.media_type, what)
            if isinstance(parsed, Manifest):
                self._content.put(body)
                return Descriptor(descriptor.media_type, descriptor.digest, len(body)), parsed
            descriptor = choose(parsed, self._platform, source.name)
        raise InvalidArgumentError(f"{source.name}: indexes are nested more than {_MAX_NESTING} deep")

    async def _configuration(self, source: BlobSource, manifest: Manifest) -> Configuration:
        what = f"{source.name}: configuration {manifest.config.digest}"
        if manifest.config.size > MAX_CONFIG:
            raise InvalidArgumentError(f"{what} has {manifest.config.size} bytes; {MAX_CONFIG} are the most allowed")
        await self._fetch(source, manifest.config)
        return parse_config(self._content.read(manifest.config.digest, MAX_CONFIG), what)

    async def _layer(
        self,
        source: BlobSource,
        layer: Descriptor,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        slots: asyncio.Semaphore,
    ) -> None:
        packed = compression(layer, source.name)
        early = _Early(lambda path: self._snapshotter.arrival(path, compression=packed, diff_id=diff_id))
        try:
            async with slots:
                await self._fetch(source, layer, early if self._snapshotter.layer(chain_id) is None else None)
        except BaseException:
            await early.close()
            raise
        early.stop()
        try:
            await self._snapshotter.unpack(
                self._content.path(layer.digest),
                compression=packed,
                diff_id=diff_id,
                chain_id=chain_id,
                parent=parent,
                arrival=early.arrival,
            )
        except DiffMismatchError as e:
            raise DataLossError(f"{source.name}: layer {layer.digest}: {e}") from e
        except LimitError as e:
            raise ResourceExhaustedError(f"{source.name}: layer {layer.digest}: {e}; {_LIMITED}") from e
        except LayerError as e:
            raise InvalidArgumentError(f"{source.name}: layer {layer.digest}: {e}") from e
        except SnapshotError as e:
            raise CriError(f"{source.name}: layer {layer.digest} cannot be unpacked: {e}") from e

    async def _fetch(self, source: BlobSource, descriptor: Descriptor, watcher: Watcher | None = None) -> None:
        async with self._alone(source.origin, descriptor.digest):
            if self._content.size(descriptor.digest) is None:
                await source.blob(descriptor, self._content, watcher)
        if self._content.size(descriptor.digest) != descriptor.size:
            raise DataLossError(
                f"{source.name}: the manifest gives blob {descriptor.digest} {descriptor.size} bytes; it has "
                f"{self._content.size(descriptor.digest)}"
            )

    @asynccontextmanager
    async def _alone(self, origin: str, digest: str) -> AsyncIterator[None]:
        """One at a time for each blob and origin: whoever waited finds the blob, or tries for itself."""
        lock = self._locks.setdefault((origin, digest), _Lock())
        lock.users += 1
        try:
            async with lock.lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[origin, digest]


class _Early:
    """Has a layer unpacked while its blob arrives, where that takes long; a Watcher.

    ``begin`` is called with the blob's file. ``arrival`` is what it made, once the blob is here.
    """

    def __init__(self, begin: Callable[[str], Arrival | None]) -> None:
        self._begin = begin
        self._timer: asyncio.TimerHandle | None = None
        self.arrival: Arrival | None = None

    def grown(self, path: str, size: int) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SOON, self._start, path)
        if self.arrival is not None:
            self.arrival.grown(size)

    def reset(self) -> None:
        self.stop()
        if self.arrival is not None:
            self.arrival.give_up()

    def stop(self) -> None:
        """Begin no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _start(self, path: str) -> None:
        self.arrival = self._begin(path)

    async def close(self) -> None:
        self.stop()
        if self.arrival is not None:
            await self.arrival.close()


class _Lock:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; the first failure ends the others and is raised when they have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None
