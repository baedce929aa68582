"""Loading an image from a registry or an archive: verified blobs, and layers that are unpacked from them.

Nothing is recorded here. What a load has brought is protected by its lease until the image is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from criserver.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from criserver.images.content import ContentStore, Watcher
from criserver.images.manifests import (
    EMPTY_LAYER,
    EMPTY_TAR,
    MANIFEST_TYPES,
    MAX_CONFIG,
    MAX_MANIFEST,
    OCI_MANIFEST,
    Configuration,
    Descriptor,
    Manifest,
    OtherPlatformError,
    chain_ids,
    check_layers,
    check_process,
    choose,
    compression,
    is_for,
    is_foreign,
    layers_with_diff_ids,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform, runs_on
from criserver.images.suspects import Suspects
from criserver.images.worker_faults import worker_fault
from criserver.telemetry import families, operations
from criserver.text import shown
from snapshotter import (
    Arrival,
    DiffMismatchError,
    LayerError,
    LimitError,
    SnapshotError,
    Snapshotter,
)

_DOWNLOADS = 3
_MAX_NESTING = 3
_LIMITED = "the configuration has this limit in [images]"
# The seconds after which a blob is unpacked while it arrives.
# 1. A faster download is limited by the processors, so an unpack at the same time would only slow it down.
# 2. A slower download loses nothing by the delay, as its worker catches up.
_SOON = 0.5


class BlobSource(Protocol):
    """Where blobs come from: a registry or an archive.

    ``name`` is the source's name in errors. Two sources with the same ``origin`` have the same blobs. So if both need
    one blob, one of them fetches it, and the other waits.
    """

    name: str
    origin: str

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index, checked against its digest."""

    async def blob(
        self,
        descriptor: Descriptor,
        content: ContentStore,
        watcher: Watcher | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """Bring a blob into ``content``, checked against its size and digest; ``watcher`` is told how it grows.

        A small blob that a load needs ``at_once`` does not wait for the downloads of others.
        """


class NoSource:
    """A BlobSource without blobs: an image is loaded from what is in the content store, or not at all."""

    origin = ""

    def __init__(self, name: str) -> None:
        self.name = name

    async def manifest(self, descriptor: Descriptor) -> bytes:
        raise DataLossError(f"{self.name}: manifest {descriptor.digest} was lost or damaged")

    async def blob(
        self,
        descriptor: Descriptor,
        content: ContentStore,  # noqa: ARG002 - the protocol's
        watcher: Watcher | None = None,  # noqa: ARG002 - the protocol's
        *,
        at_once: bool = False,  # noqa: ARG002 - the protocol's
    ) -> None:
        raise DataLossError(f"{self.name}: blob {descriptor.digest} was lost or damaged")


@dataclass(slots=True, eq=False)
class Lease:
    """Blobs and layers that a load or an export needs. The garbage collection does not delete them.

    ``plan`` has the layers of the image that is loaded, each as blob and chain ID, once they are known.
    """

    blobs: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    plan: tuple[tuple[Descriptor, str], ...] = ()


class Loader:
    """Loads images into a content store and a snapshotter. A daemon has one, so that concurrent loads share work."""

    def __init__(self, content: ContentStore, snapshotter: Snapshotter, platform: Platform, suspects: Suspects) -> None:
        self._content = content
        self._suspects = suspects
        self._snapshotter = snapshotter
        self._platform = platform
        self._locks: dict[tuple[str, str], _Lock] = {}

    async def load(self, source: BlobSource, target: Descriptor, lease: Lease) -> Descriptor:
        """Load the image for this platform from ``target``, a manifest or an index. Returns the image's manifest.

        The configuration's platform is checked if neither ``target`` nor an index below it names a platform.

        1. A few blobs are fetched at a time. Blobs and layers that are here already are not fetched or unpacked again.
        2. A layer whose blob takes long is unpacked while the blob arrives. It is committed when the whole blob is
           there and has the right digest.
        3. Blobs and layers are put under ``lease`` before they are looked for.
        4. Suspects are checked first. Damaged ones are fetched or unpacked anew.
        """
        descriptor, manifest = await self._manifest(source, target, lease)
        what = f"{source.name}: manifest {descriptor.digest}"
        most = self._snapshotter.limits.max_layers
        if len(manifest.layers) > most:
            raise ResourceExhaustedError(
                f"{what} has {len(manifest.layers)} layers, more than {most} (max_layers); {_LIMITED}"
            )
        for blob in (*manifest.layers, *manifest.others):
            # Before the first byte: a registry may send as many as the manifest says.
            if blob.size > (room := self._snapshotter.limits.max_bytes):
                raise ResourceExhaustedError(
                    f"{what}: blob {blob.digest} has {blob.size} bytes, more than {room} (max_bytes); {_LIMITED}"
                )
        lease.blobs.add(manifest.config.digest)
        configuration = await self._configuration(source, manifest)
        check_layers(manifest, configuration, what)
        if not isinstance(source, NoSource):  # an image that is here is kept
            check_process(configuration, what)
        if not is_for(descriptor, self._platform) and not runs_on(configuration.platform, self._platform):
            raise OtherPlatformError(
                f"{source.name} is for {shown(configuration.platform)}; this node runs {self._platform}"
            )
        layers = layers_with_diff_ids(manifest, configuration)
        chain = chain_ids([diff_id for _, diff_id in layers])
        lease.blobs.update(blob.digest for blob in (*(layer for layer, _ in layers), *manifest.others))
        lease.layers.update(chain)
        lease.plan = tuple((layer, chain_id) for (layer, _), chain_id in zip(layers, chain, strict=True))
        slots = asyncio.Semaphore(_DOWNLOADS)
        work = [
            self._layer(source, layer, diff_id, chain_id, parent, slots)
            for (layer, diff_id), chain_id, parent in zip(layers, chain, (None, *chain), strict=False)
        ]
        await _all([*work, *(self._other(source, blob, slots) for blob in manifest.others)])
        return descriptor

    async def _manifest(self, source: BlobSource, target: Descriptor, lease: Lease) -> tuple[Descriptor, Manifest]:
        descriptor = target
        for _ in range(_MAX_NESTING):
            lease.blobs.add(descriptor.digest)
            await self._suspects.check_blob(descriptor.digest)
            if self._content.size(descriptor.digest) is None:
                body = await source.manifest(descriptor)
            else:
                body = self._content.read(descriptor.digest, MAX_MANIFEST)
            what = f"{source.name}: manifest {descriptor.digest}"
            parsed = parse_manifest(body, descriptor.media_type, what)
            if isinstance(parsed, Manifest):
                await self._content.put(body, descriptor.digest)
                kind = descriptor.media_type if descriptor.media_type in MANIFEST_TYPES else OCI_MANIFEST
                return replace(descriptor, media_type=kind, size=len(body)), parsed
            descriptor = choose(parsed, self._platform, source.name)
        raise InvalidArgumentError(f"{source.name}: indexes are nested more than {_MAX_NESTING} deep")

    async def _configuration(self, source: BlobSource, manifest: Manifest) -> Configuration:
        what = f"{source.name}: configuration {manifest.config.digest}"
        if manifest.config.size > MAX_CONFIG:
            raise InvalidArgumentError(f"{what} has {manifest.config.size} bytes; {MAX_CONFIG} are the most allowed")
        await self._fetch(source, manifest.config, at_once=True)
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
                await self._suspects.check_layer(chain_id, layer.digest, packed)
        except BaseException as e:
            await early.close()
            if isinstance(e, NotFoundError) and is_foreign(layer):
                advice = "it is a foreign layer, which registries may lack; build the image on a base without one"
                raise NotFoundError(f"{e}; {advice}") from e
            raise
        early.stop()
        is_new = self._snapshotter.layer(chain_id) is None
        try:
            with operations.UNPACK.timed(layer.digest):
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
            raise worker_fault(e)(f"{source.name}: layer {layer.digest} cannot be unpacked: {e}") from e
        families.LAYERS_UNPACKED.add(is_new)

    async def _other(self, source: BlobSource, blob: Descriptor, slots: asyncio.Semaphore) -> None:
        """Bring a blob that is no layer of files."""
        async with slots:
            await self._fetch(source, blob)

    async def _fetch(
        self, source: BlobSource, descriptor: Descriptor, watcher: Watcher | None = None, *, at_once: bool = False
    ) -> None:
        async with self._alone(source.origin, descriptor.digest):
            await self._suspects.check_blob(descriptor.digest)
            if self._content.size(descriptor.digest) is None:
                if descriptor == EMPTY_LAYER:
                    await self._content.put(EMPTY_TAR)
                else:
                    with operations.DOWNLOAD.timed(descriptor.digest):
                        await source.blob(descriptor, self._content, watcher, at_once=at_once)
        if self._content.size(descriptor.digest) != descriptor.size:
            raise DataLossError(
                f"{source.name}: the manifest gives blob {descriptor.digest} {descriptor.size} bytes; it has "
                f"{self._content.size(descriptor.digest)}"
            )

    @asynccontextmanager
    async def _alone(self, origin: str, digest: str) -> AsyncIterator[None]:
        """A lock for each blob and origin. A load that has waited finds the blob here, or fetches it itself."""
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
    """A Watcher that begins to unpack a layer while its blob arrives, if that takes long.

    ``begin`` is called with the blob's file. ``arrival`` is its result, None if it was not called.
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
        """Do not begin any more."""
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
    """Run all at the same time. The first failure cancels the others, and is raised when they have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except BaseExceptionGroup as e:
        # Its cause stays: that says whether the node has run out of something.
        raise e.exceptions[0] from e.exceptions[0].__cause__
