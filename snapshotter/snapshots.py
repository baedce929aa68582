"""The snapshotter: layers by chain ID, writable snapshots by key, and their overlay mounts.

The file system is the only record. Below the root there are

    layers/<n>/    {fs/, meta.json}        committed layers, read-only; n is short, as overlay's options are
    active/<key>/  {fs/, work/, meta.json} writable snapshots
    staging/       whatever is being made or deleted: see snapshotter.staging

One rename(2) out of staging makes a layer or snapshot, and one into it removes it. So it is always there as a whole, or
not at all.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import structlog

from snapshotter import file_tree, listed_types, metadata, settling
from snapshotter.arrival import Arrival
from snapshotter.errors import LayerError, SnapshotError, SnapshotNotFoundError
from snapshotter.file_tree import TreeUsage
from snapshotter.files import make_private
from snapshotter.layer_stream import COMPRESSIONS
from snapshotter.limits import LayerLimits
from snapshotter.metadata import KEY, Layer, Snapshot
from snapshotter.overlay import OverlayMounter
from snapshotter.shared_task import SharedTasks
from snapshotter.staging import Staging
from snapshotter.tasks import LastingTasks
from snapshotter.threads import Threads, deletions, in_loose_thread, in_thread
from snapshotter.worker_process import Workers, compare

log = structlog.get_logger(__name__)

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_UNHURRIED = 1.0  # seconds after which a layer that is settled leaves processor time to others


class Snapshotter:
    """Layers and snapshots below one directory, which no other process changes.

    Creating it deletes what an earlier process has left half done. Committed layers and snapshots whose metadata is
    missing or broken are dropped. The log says which, and what cannot be deleted. ``limits`` hold for every layer,
    ``workers`` bounds how many are unpacked at the same time. Needs root. Methods raise :class:`SnapshotError`.
    """

    def __init__(self, root: str, *, limits: LayerLimits | None = None, workers: int | None = None) -> None:
        self.root = os.path.abspath(root)
        self.commits = 0  # layers committed by this object
        self._layers: dict[str, Layer] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._preparing: dict[str, str] = {}  # the layers of snapshots that are being made, by key
        self._unsettled: set[str] = set()  # layers that must be settled before they are mounted, by chain ID
        # A tree of many files is measured for minutes: other work has threads beside it.
        self._measures = Threads(2, "measures")
        self._layer_deletions = Threads(2, "layer-deletions")
        self._settlings: LastingTasks[None] = LastingTasks()  # by the layers' paths
        self._retiring = asyncio.Lock()  # of snapshots: two removals of one must not both rename it
        self._unpacks: SharedTasks[str, str | None, Layer] = SharedTasks()  # by chain ID; the note is the parent
        for name in ("", "layers", "active", "staging", "empty"):
            make_private(self._path(name))
        self._staging = Staging(self._path("staging"))
        self._load_layers()
        self._load_snapshots()
        self._undeleted = self._staging.sweep()  # removed snapshots that are still in staging, by key
        used = (int(name) for name in os.listdir(self._path("layers")) if _NUMBER.fullmatch(name))
        self._numbers = itertools.count(max(used, default=0) + 1)
        self._mounter = OverlayMounter(self.root, self._staging)
        self._workers = Workers(self._staging, limits or LayerLimits(), workers or max(2, os.cpu_count() or 1))

    @property
    def limits(self) -> LayerLimits:
        """The limits of layers. New ones hold for the layers that are unpacked from then on."""
        return self._workers.limits

    @limits.setter
    def limits(self, limits: LayerLimits) -> None:
        self._workers.limits = limits

    def close(self) -> None:
        """End the threads. What is mounted stays mounted."""
        self._mounter.close()

    def layer(self, chain_id: str) -> Layer | None:
        """The committed layer with that chain ID, or None."""
        return self._layers.get(chain_id)

    def layers(self) -> Mapping[str, Layer]:
        """The committed layers by chain ID."""
        return MappingProxyType(self._layers)

    def snapshots(self) -> Mapping[str, Snapshot]:
        """The writable snapshots by key."""
        return MappingProxyType(self._snapshots)

    def removable(self) -> frozenset[str]:
        """The keys for which :meth:`remove` is still to be called, because it was not yet or because it has failed."""
        return frozenset((*self._snapshots, *self._undeleted))

    def arrival(self, blob: str, *, compression: Literal["gzip", "none", "zstd"], diff_id: str) -> Arrival | None:
        """Begin to unpack a layer while its blob is still being written to the file ``blob``, which may be renamed.

        None if the largest number of such workers is running already, or if the file cannot be read.
        """
        return self._workers.arrival(blob, compression, diff_id)

    async def unpack(
        self,
        blob: str,
        *,
        compression: Literal["gzip", "none", "zstd"],
        diff_id: str,
        chain_id: str,
        parent: str | None,
        arrival: Arrival | None = None,
    ) -> Layer:
        """Unpack the layer in the file ``blob`` and commit it as ``chain_id``. Returns at once if it is committed.

        1. If ``compression`` is not "none", the blob's first bytes say which compression it has.
        2. The parent may still be missing, as a layer's files do not depend on it.
        3. Callers with the same chain ID share one unpack. When the last of them is cancelled, it is cancelled too, and
           nothing is left of it.
        4. ``arrival`` is an unpack of the same blob that has begun before. It ends with this call.

        Raises LayerError for broken or hostile content: DiffMismatchError if its digest is not ``diff_id``,
        TruncatedLayerError if it ends early. Raises SnapshotError if the node is at fault.
        """
        if compression not in COMPRESSIONS:
            raise SnapshotError(
                f"layer compression {compression!r} is not supported; {' and '.join(sorted(COMPRESSIONS))} are"
            )
        if not _DIFF_ID.fullmatch(diff_id):
            raise SnapshotError(f"diff ID {diff_id!r} is not a sha256 digest")
        if arrival is not None and (chain_id in self._layers or chain_id in self._unpacks.notes):
            await arrival.close()
            arrival = None
        if layer := self._layers.get(chain_id):
            return layer
        return await self._unpacks.run(
            chain_id, parent, lambda: self._unpack(blob, compression, diff_id, chain_id, parent, arrival)
        )

    async def prepare(self, key: str, chain_id: str) -> None:
        """Make the empty writable snapshot ``key`` on top of the layer ``chain_id``.

        Raises SnapshotNotFoundError if that layer or one below it is missing.
        """
        if not KEY.fullmatch(key):
            raise SnapshotError(f"snapshot key {key!r} is not 1 to 128 letters, digits, '_', '.' and '-'")
        await self._settle(chain_id)
        if key in self._snapshots or key in self._preparing:
            raise SnapshotError(f"snapshot {key} is there already")
        top = self._chain(chain_id)[0]
        path = self._path("active", key)
        self._preparing[key] = chain_id
        try:
            await self._mounter.run(self._make_snapshot, path, chain_id, top)
        finally:
            del self._preparing[key]
            # Also where its caller was cancelled after the last step: the snapshot can be removed then.
            if os.path.exists(path):
                self._snapshots[key] = Snapshot(key, chain_id, path)

    async def mount(self, key: str, target: str, *, userns: str | None = None, label: str = "") -> None:
        """Mount the snapshot ``key`` on the directory ``target``, writable; its files have the SELinux ``label``.

        ``userns`` is the file of a user namespace. With it the image's files belong to users of that namespace. Each
        mount of a snapshot must have the same one. It takes a node without :meth:`idmap_trouble`.
        """
        snapshot = self._snapshot(key)
        await self._mounter.mount(snapshot, self._chain(snapshot.chain_id), target, userns=userns, label=label)

    async def mount_layer(self, chain_id: str, target: str) -> None:
        """Mount the files of ``chain_id`` and the layers below it on the directory ``target``, read-only.

        Such a mount does not keep its layers from being removed: its caller has to.
        """
        await self._settle(chain_id)
        await self._mounter.mount_layers(self._chain(chain_id), target)

    async def unmount(self, *targets: str) -> None:
        """Unmount all that is mounted on each of ``targets``, in this order, lazily if it is busy.

        It is no error if nothing is mounted there. Raises SnapshotError for one that cannot be unmounted.
        """
        await self._mounter.unmount(*targets)

    async def remove(self, key: str) -> None:
        """Remove the writable snapshot ``key``, which must be unmounted. It is no error if it is missing.

        Raises SnapshotError with the reason if its files cannot be deleted. It is no snapshot any more then, and the
        next call tries the deletion again.
        """
        async with self._retiring:
            if (snapshot := self._snapshots.get(key)) is not None:
                name = self._staging.removed_name(key)
                try:
                    await self._mounter.run(self._staging.retire, snapshot.path, name)
                finally:
                    # Also where the caller was cancelled after it.
                    if not os.path.exists(snapshot.path):
                        del self._snapshots[key]
                        self._undeleted[key] = name
        if (undeleted := self._undeleted.get(key)) is not None:
            await in_thread(self._staging.delete, undeleted, executor=deletions)
            self._undeleted.pop(key, None)

    async def remove_layer(self, chain_id: str) -> None:
        """Remove a layer. It is no error if it is missing.

        Raises SnapshotError in two cases:

        1. Another layer or a snapshot needs it: it stays.
        2. Its files cannot be deleted: it is no layer any more, and :meth:`delete_rest` tries the deletion again.
        """
        layer = self._layers.get(chain_id)
        if layer is None:
            return
        users = [f"layer {other.chain_id}" for other in self._layers.values() if other.parent == chain_id]
        users += [f"layer {other}" for other, parent in self._unpacks.notes.items() if parent == chain_id]
        users += [f"snapshot {s.key}" for s in self._snapshots.values() if s.chain_id == chain_id]
        users += [f"snapshot {key}" for key, layer_id in self._preparing.items() if layer_id == chain_id]
        if users:
            raise SnapshotError(f"layer {chain_id} is in use by {users[0]}; remove that first")
        await self._delete_layer(layer)

    async def delete_rest(self) -> None:
        """Try to delete again what could not be deleted. A failure is logged."""
        await in_thread(self._staging.delete_rest)

    async def check_layer(self, chain_id: str, blob: str = "", compression: str = "gzip") -> str:
        """What is wrong with a committed layer on disk; "" if nothing is, or if the layer has been removed.

        If ``blob`` is the file that the layer came from, a process compares all its files with that (see
        snapshotter.layer_check). If there is none, or it cannot be read, only the layer's metadata is checked. Raises
        OSError and SnapshotError if the two cannot be compared now, as for a limit of processes.
        """
        layer = self._layers.get(chain_id)
        if layer is None:
            return ""
        if layer.parent is not None and layer.parent not in self._layers:
            return f"the layer below it, {layer.parent}, is missing"
        wrong = await asyncio.to_thread(metadata.check, layer)
        if blob and not wrong:
            with suppress(FileNotFoundError, LayerError):
                wrong = await compare(layer, blob, compression, self.limits)
        return wrong if self._layers.get(chain_id) is layer else ""

    async def compare_layer(self, chain_id: str, blob: str, compression: str) -> str:
        """What is wrong with a layer on disk, whatever is below it; "" if nothing is, or if it has been removed.

        ``blob`` is the file that the layer came from, and is sound. As the cheapest comes first: the metadata, the
        lists for settling it, and at last all files. There is no other copy of these lists, so a layer that still has
        one counts as damaged. So does a layer for which the comparison fails. Raises OSError if the comparison
        cannot be started, such as for a limit of processes.
        """
        layer = self._layers.get(chain_id)
        if layer is None:
            return ""
        wrong = await asyncio.to_thread(metadata.check, layer)
        if not wrong and chain_id in self._unsettled:
            wrong = "its lists of implied directories and whiteouts cannot be checked"
        if not wrong:
            try:
                wrong = await compare(layer, blob, compression, self.limits)
            except SnapshotError as e:
                wrong = str(e)
        return wrong if self._layers.get(chain_id) is layer else ""

    async def drop_layer(self, chain_id: str) -> None:
        """Remove a damaged layer also if others need it: it is to be unpacked anew. Nothing may be mounted on it."""
        layer = self._layers.get(chain_id)
        if layer is not None:
            await self._delete_layer(layer)

    async def usage(self, key: str) -> TreeUsage:
        """What the snapshot ``key`` itself occupies, without the layers below it."""
        path = os.path.join(self._snapshot(key).path, "fs")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._measures, file_tree.measure, path)
        except OSError as e:
            raise SnapshotError(f"cannot measure snapshot {key}: {e}") from e

    async def idmap_trouble(self) -> str:
        """Why snapshots cannot be mounted for a user namespace; "" if they can.

        It takes Linux 5.19 and a file system with id-mapped mounts. It is tried once, on the file system of the layers.
        Raises SnapshotError and OSError if it cannot be tried now. The next call tries again.
        """
        return await self._mounter.idmap_trouble()

    def file_system_trouble(self) -> str:
        """Why images cannot be unpacked on this file system; "" if they can. Raises OSError if that cannot be read."""
        if listed_types.are_known(self.root):
            return ""
        return (
            f"lists of directories do not have the types of files on the file system of {self.root}, so files that "
            "images delete would stay in lists; it takes another one, such as XFS with ftype=1 or ext4 with filetype"
        )

    def _path(self, *names: str) -> str:
        return os.path.join(self.root, *names)

    def _snapshot(self, key: str) -> Snapshot:
        snapshot = self._snapshots.get(key)
        if snapshot is None:
            raise SnapshotNotFoundError(f"no snapshot {key}")
        return snapshot

    def _chain(self, chain_id: str) -> list[Layer]:
        """The layer and those below it, topmost first."""
        chain: list[Layer] = []
        wanted: str | None = chain_id
        while wanted is not None:
            layer = self._layers.get(wanted)
            if layer is None:
                raise SnapshotNotFoundError(f"layer {wanted} of {chain_id} is missing; pull its image again")
            chain.append(layer)
            wanted = layer.parent
        return chain

    async def _settle(self, chain_id: str) -> None:
        """Make a chain of layers ready to be mounted: see snapshotter.settling. Raises SnapshotNotFoundError."""
        chain = self._chain(chain_id)
        if self._unsettled.isdisjoint(layer.chain_id for layer in chain):
            return
        below: list[Layer] = []
        for layer in reversed(chain):
            if layer.chain_id in self._unsettled:
                paths = [] if layer.opaque else [lower.path for lower in below]
                try:
                    await self._settle_layer(layer, paths)
                except OSError as e:
                    self._chain(chain_id)  # raises if it has been removed meanwhile
                    raise SnapshotError(f"layer {layer.chain_id} cannot be made ready: {e}") from e
            below = [layer] if layer.opaque else [layer, *below]

    async def _settle_layer(self, layer: Layer, below: list[str]) -> None:
        """Settle a layer once, whoever waits for it. An image that takes long holds up no other. Raises OSError."""
        last, worked = time.monotonic(), 0.0

        def check() -> None:
            nonlocal last, worked
            step = time.monotonic() - last
            worked += step
            if worked > self.limits.max_seconds:
                raise TimeoutError(errno.ETIMEDOUT, "it takes longer than an unpack may take")
            if worked > _UNHURRIED:
                # All that take long together get half of one processor's time: the event loop needs the other.
                time.sleep(min(step * len(self._settlings), _UNHURRIED))
            last = time.monotonic()

        async def settle() -> None:
            await in_loose_thread(partial(settling.settle, layer.path, below, check), "settling")
            # It may have been removed and unpacked anew meanwhile.
            if self._layers.get(layer.chain_id) is layer:
                self._unsettled.discard(layer.chain_id)

        await self._settlings.run(layer.path, settle)

    async def _delete_layer(self, layer: Layer) -> None:
        """Delete a layer.

        1. It is removed from the layers before the first await, so nobody can begin to use it.
        2. If its directory cannot be moved to staging, it becomes a layer again.
        3. Once its directory is moved, its files are deleted also if the caller is cancelled.
        """
        del self._layers[layer.chain_id]
        unsettled = layer.chain_id in self._unsettled
        self._unsettled.discard(layer.chain_id)
        name = self._staging.removed_name()
        try:
            await self._mounter.run(self._staging.retire, layer.path, name)
        except asyncio.CancelledError:
            if not os.path.exists(layer.path):
                await in_thread(self._staging.discard, name)
            raise
        finally:
            if os.path.exists(layer.path) and layer.chain_id not in self._layers:
                self._layers[layer.chain_id] = layer
                if unsettled:
                    self._unsettled.add(layer.chain_id)
        await in_thread(self._staging.delete, name, executor=self._layer_deletions)

    def _make_snapshot(self, path: str, chain_id: str, top: Layer) -> None:
        """Make a snapshot on disk. Raises OSError and SnapshotNotFoundError, with nothing left of it."""
        area = self._staging.new()
        try:
            # The root directory of an overlay is the upper one, so it gets the owner and mode of the image's.
            try:
                status = os.stat(os.path.join(top.path, "fs"))
            except FileNotFoundError as e:
                raise SnapshotNotFoundError(f"the files of layer {chain_id} are gone: {e.filename}") from e
            self._staging.new_root(area, status.st_uid, status.st_gid, status.st_mode & 0o7777)
            os.mkdir(os.path.join(area, "work"), 0o700)
            metadata.write(area, {"chain_id": chain_id})
            os.rename(area, path)
        except BaseException:
            self._staging.discard(area)
            raise

    def _load_layers(self) -> None:
        for name in sorted(os.listdir(self._path("layers"))):
            path = self._path("layers", name)
            try:
                layer = metadata.read_layer(path)
                if not _NUMBER.fullmatch(name) or layer.chain_id in self._layers:
                    raise ValueError("it is a duplicate or has no number")  # noqa: TRY301 - handled below
            except (ValueError, TypeError) as e:
                self._drop(path, e)
            except OSError as e:
                log.warning("a layer cannot be read and is left as it is", path=path, error=str(e))
            else:
                self._layers[layer.chain_id] = layer
                if settling.is_needed(path):
                    self._unsettled.add(layer.chain_id)

    def _load_snapshots(self) -> None:
        for key in os.listdir(self._path("active")):
            path = self._path("active", key)
            try:
                self._snapshots[key] = metadata.read_snapshot(path)
            except (ValueError, TypeError, KeyError) as e:
                self._drop(path, e)
            except OSError as e:
                log.warning("a snapshot cannot be read and is left as it is", path=path, error=str(e))

    def _drop(self, path: str, reason: Exception) -> None:
        log.warning("dropped, as its metadata is unusable", path=path, error=str(reason))
        try:
            self._staging.retire(path, self._staging.removed_name())
        except SnapshotError as e:
            log.warning("a dropped layer or snapshot cannot be moved into staging", error=str(e))

    def _undo(self, area: str, path: str) -> None:
        """Delete a layer that may be committed already, and that nobody knows."""
        if os.path.exists(path):
            os.rename(path, area)
        self._staging.discard(area)

    async def _unpack(
        self, blob: str, compression: str, diff_id: str, chain_id: str, parent: str | None, arrival: Arrival | None
    ) -> Layer:
        area, made = await self._workers.unpack(blob, compression, diff_id, arrival)
        meta = {"chain_id": chain_id, "diff_id": diff_id, "parent": parent, **made}
        path = self._path("layers", str(next(self._numbers)))
        try:
            await self._mounter.run(_commit, area, meta, path)
        except OSError as e:
            await in_thread(self._staging.discard, area)
            raise SnapshotError(f"cannot commit layer {diff_id}: {e}") from e
        except asyncio.CancelledError:
            await in_thread(self._undo, area, path)
            raise
        layer = self._layers[chain_id] = Layer(**meta, path=path)
        self.commits += 1
        if settling.is_needed(path):
            self._unsettled.add(chain_id)
        return layer


def _commit(area: str, meta: dict[str, Any], path: str) -> None:
    """Make a layer whole: nobody sees it before its rename. Raises OSError."""
    metadata.write(area, meta)
    os.rename(area, path)
