"""The snapshotter: layers by chain ID, writable snapshots by key, and their overlay mounts.

The file system is the only record. Below the root there are

    layers/<n>/    {fs/, meta.json}        committed layers, read-only; n is short, as overlay's options are
    active/<key>/  {fs/, work/, meta.json} writable snapshots
    staging/       whatever is being made or deleted, and mounts that are needed for a moment; what a snapshot was is
                   there as removed-<random>-<key>

A layer or snapshot comes into being by one rename(2) out of staging and ends by one into it, so that at any
instant it is there as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, TypeVar

import isal
import structlog

from snapshotter import errors, file_tree, implied, marks, mounts, removal
from snapshotter.arrival import Arrival, Unpacked
from snapshotter.errors import SnapshotError, SnapshotNotFoundError
from snapshotter.file_tree import Usage
from snapshotter.files import make_private
from snapshotter.limits import Limits
from snapshotter.model import Layer, Snapshot
from snapshotter.streams import COMPRESSIONS
from snapshotter.tasks import outlive
from snapshotter.threads import Threads, in_thread

_T = TypeVar("_T")

log = structlog.get_logger(__name__)

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_REMOVED = re.compile(rf"removed-[0-9a-f]{{16}}-({_KEY.pattern})")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_META = "meta.json"
_MAX_OPTIONS = 4095  # mount(2) takes one page, with a zero at its end
_MOUNT_THREADS = 4
_MAX_ARRIVALS = 3  # beside the workers whose blobs are whole: a registry that trickles must not hold those up
_MAX_OUTPUT = 64 << 10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_USERNS_SECONDS = 10.0  # to start a process and have it make a user namespace, which takes milliseconds

# The worker imports this package's modules without its __init__, and without site: half of its start-up time.
_WORKER = """
import sys, types
package = types.ModuleType("snapshotter")
package.__path__ = [sys.argv.pop()]
sys.modules["snapshotter"] = package
sys.path.append(sys.argv.pop())
from snapshotter.worker import main
main()
"""
_CHECKER = _WORKER.replace("snapshotter.worker", "snapshotter.check")
# Makes a user namespace, says with "0" that it is there, and ends with its parent.
_USERNS_MAKER = """
import ctypes, os
os.write(1, b"%d" % ctypes.CDLL(None).unshare(0x10000000))
os.read(0, 1)
"""
_WORKER_PATHS = (os.path.dirname(os.path.dirname(isal.__file__)), os.path.dirname(__file__))
_WORKER_ERRORS: dict[str, type[SnapshotError]] = {
    kind.__name__: kind
    for kind in (
        errors.LayerError,
        errors.LimitError,
        errors.TruncatedLayerError,
        errors.DiffMismatchError,
        SnapshotError,
    )
}


class _Flight:
    """An unpack under way, and how many callers wait for it."""

    def __init__(self, task: asyncio.Task[Layer], parent: str | None) -> None:
        self.task = task
        self.parent = parent
        self.waiters = 0


class Snapshotter:
    """Layers and snapshots below one directory, which no other process changes.

    Creating one sweeps what an earlier process left half done. The log is told which committed layers and snapshots
    were dropped because their metadata is missing or broken, and what cannot be swept. ``limits`` hold for every
    layer; ``workers`` bounds how many are unpacked at the same time. Needs root; methods raise :class:`SnapshotError`.
    """

    def __init__(self, root: str, *, limits: Limits | None = None, workers: int | None = None) -> None:
        self._root = os.path.abspath(root)
        self.limits = limits or Limits()
        self._layers: dict[str, Layer] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._undeleted: dict[str, str] = {}  # removed snapshots that are still in staging, by key
        self._flights: dict[str, _Flight] = {}
        self._unsettled: set[str] = set()  # layers that have implied directories, by chain ID
        self._settling = asyncio.Lock()
        self._idmap_trouble: str | None = None
        self._slots = asyncio.Semaphore(workers or max(2, os.cpu_count() or 1))
        self._arrivals = 0
        for name in ("", "layers", "active", "staging", "empty"):
            make_private(self._path(name))
        self._load_layers()
        self._load_snapshots()
        # First the mounts: what is seen through them is not to be deleted.
        for point in mounts.mounts_below(os.path.realpath(self._path("staging"))):
            try:
                _unmount(point)
            except SnapshotError as e:
                log.warning("a mount is left in staging", error=str(e))
        for name in os.listdir(self._path("staging")):
            try:
                self._delete(name)
            except SnapshotError as e:
                log.warning("something is left in staging", error=str(e))
                if key := _REMOVED.fullmatch(name):
                    self._undeleted[key[1]] = name
        used = (int(name) for name in os.listdir(self._path("layers")) if _NUMBER.fullmatch(name))
        self._numbers = itertools.count(max(used, default=0) + 1)
        self._mount_threads = Threads(_MOUNT_THREADS, "mounts", self._enter_layers)

    def close(self) -> None:
        """End the threads. What is mounted stays mounted."""
        self._mount_threads.shutdown()

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
        """The keys of all that :meth:`remove` is still to be called for: also where it has failed."""
        return frozenset((*self._snapshots, *self._undeleted))

    def arrival(self, blob: str, *, compression: Literal["gzip", "none", "zstd"], diff_id: str) -> Arrival | None:
        """Begin to unpack the layer whose blob is still being written to the file ``blob``, which may be renamed.

        None where as many as may be at the same time are waiting for more already, or the file cannot be read.
        """
        if self._arrivals == _MAX_ARRIVALS:
            return None
        try:
            file = open(blob, "rb")  # noqa: SIM115 - the task closes it
        except OSError:
            return None
        told, pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(told, True)
        self._arrivals += 1
        task = asyncio.create_task(self._make(file, compression, diff_id, told))

        def ended(_: asyncio.Task[Unpacked]) -> None:
            self._arrivals -= 1
            file.close()
            os.close(told)

        task.add_done_callback(ended)
        return Arrival(task, pipe, self._discard)

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
        """Unpack the layer in the file ``blob`` and commit it as ``chain_id``; at once where it is committed.

        Where ``compression`` is not "none", the blob's first bytes say which of them all it is. The parent may still be
        missing: a layer's files do not depend on it. Callers with the same chain ID share one unpack, which ends
        early when the last of them is cancelled; nothing is left of it then. ``arrival`` may have begun with the same
        blob, and is used up.

        Raises LayerError for content that is broken or hostile, with DiffMismatchError where its digest is not
        ``diff_id`` and TruncatedLayerError where it ends early, and SnapshotError for the node's own trouble.
        """
        if compression not in COMPRESSIONS:
            raise SnapshotError(
                f"layer compression {compression!r} is not supported; {' and '.join(sorted(COMPRESSIONS))} are"
            )
        if not _DIFF_ID.fullmatch(diff_id):
            raise SnapshotError(f"diff ID {diff_id!r} is not a sha256 digest")
        if arrival is not None and (chain_id in self._layers or chain_id in self._flights):
            await arrival.close()
            arrival = None
        if layer := self._layers.get(chain_id):
            return layer
        flight = self._flights.get(chain_id)
        if flight is None:
            task = asyncio.create_task(self._unpack(blob, compression, diff_id, chain_id, parent, arrival))
            flight = self._flights[chain_id] = _Flight(task, parent)
            task.add_done_callback(lambda _: self._land(chain_id, flight))
        flight.waiters += 1
        try:
            return await outlive(flight.task)
        except asyncio.CancelledError:
            if flight.waiters == 1 and not flight.task.done():
                # Whoever asks from now on starts anew and does not join an unpack that is going down.
                self._land(chain_id, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])
            raise
        finally:
            flight.waiters -= 1

    async def prepare(self, key: str, chain_id: str) -> None:
        """Make the empty writable snapshot ``key`` on top of the layer ``chain_id``.

        Raises SnapshotNotFoundError where that layer or one below it is missing.
        """
        if not _KEY.fullmatch(key):
            raise SnapshotError(f"snapshot key {key!r} is not 1 to 128 letters, digits, '_', '.' and '-'")
        await self._settle(chain_id)
        if key in self._snapshots:
            raise SnapshotError(f"snapshot {key} is there already")
        top = self._chain(chain_id)[0]
        area = tempfile.mkdtemp(dir=self._path("staging"))
        try:
            # The mount's root directory is the upper one: it takes owner and mode from the image's.
            status = os.stat(os.path.join(top.path, "fs"))
            _make_root(area, status.st_uid, status.st_gid, status.st_mode & 0o7777)
            os.mkdir(os.path.join(area, "work"), 0o700)
            _write_meta(area, {"chain_id": chain_id})
            os.rename(area, self._path("active", key))
        except BaseException:
            self._discard(area)
            raise
        self._snapshots[key] = Snapshot(key, chain_id, self._path("active", key))

    async def mount(self, key: str, target: str, *, userns: str | None = None, label: str = "") -> None:
        """Mount the snapshot ``key`` on the directory ``target``, writable; its files have the SELinux ``label``.

        With ``userns``, the file of a user namespace, the image's files belong to users of that namespace. It is
        the same one at each mount of a snapshot. It must not have an :meth:`idmap_trouble`.
        """
        snapshot = self._snapshot(key)
        # Relative to the directory in which the layers are seen: layers/ or, with mapped owners, one in staging/.
        upper = f"../active/{key}" if userns is None else f"../../active/{key}"
        # volatile: no sync of the whole file system as the mount goes. A snapshot is not used again after a crash
        # of the node, which is what that sync is for. index=off: an index would tie the upper directory to these
        # layers by file handles, which copies of them do not keep. xino stays at the kernel's "auto".
        options = (
            f"lowerdir={self._lower(snapshot.chain_id)},upperdir={upper}/fs,workdir={upper}/work,index=off,volatile"
        )
        if label:
            options += f',context="{label}"'
        await self._mount(target, options, 0, snapshot=snapshot, userns=userns)

    async def mount_layer(self, chain_id: str, target: str) -> None:
        """Mount the files of ``chain_id`` and the layers below it on the directory ``target``, read-only.

        Such a view does not keep its layers: whoever mounts it does not remove them while it is used.
        """
        await self._settle(chain_id)
        # With an empty layer beneath, one layer is mounted as several are: overlay wants two.
        options = f"lowerdir={self._lower(chain_id)}:../empty,index=off"
        await self._mount(target, options, mounts.MS_RDONLY)

    async def unmount(self, target: str) -> None:
        """Unmount all that is mounted on ``target``, lazily where it is busy; nothing mounted is no error."""
        await self._in_mount_thread(_unmount, os.path.abspath(target))

    async def remove(self, key: str) -> None:
        """Remove the writable snapshot ``key``, which is unmounted; one that is not there is no error.

        Raises SnapshotError where it is no snapshot any more and cannot be deleted: what hinders it is named, and the
        next call tries again.
        """
        if key in self._snapshots:
            self._undeleted[key] = self._retire(self._snapshots[key].path, f"-{key}")
            del self._snapshots[key]
        name = self._undeleted.get(key)
        if name is not None:
            await in_thread(self._delete, name)
            self._undeleted.pop(key, None)

    async def remove_layer(self, chain_id: str) -> None:
        """Remove a layer; one that is not there is no error.

        Raises SnapshotError while another layer or a snapshot stands on it, and where it is no layer any more and
        cannot be deleted; the next start tries again.
        """
        layer = self._layers.get(chain_id)
        if layer is None:
            return
        users = [f"layer {other.chain_id}" for other in self._layers.values() if other.parent == chain_id]
        users += [f"layer {other}" for other, flight in self._flights.items() if flight.parent == chain_id]
        users += [f"snapshot {s.key}" for s in self._snapshots.values() if s.chain_id == chain_id]
        if users:
            raise SnapshotError(f"layer {chain_id} is in use by {users[0]}; remove that first")
        name = self._retire(layer.path)
        del self._layers[chain_id]
        self._unsettled.discard(chain_id)
        await in_thread(self._delete, name)

    async def check_layer(self, chain_id: str, blob: str = "", compression: str = "gzip") -> str:
        """What is wrong with a committed layer on disk; "" where nothing is, or where it is not there any more.

        With the file ``blob`` that it came from, all its files are compared with that, by a process of its own (see
        snapshotter.check). Without, or where that cannot be read, only its record is looked at.
        """
        layer = self._layers.get(chain_id)
        if layer is None:
            return ""
        if layer.parent is not None and layer.parent not in self._layers:
            return f"the layer below it, {layer.parent}, is missing"
        wrong = await asyncio.to_thread(_check_record, layer)
        if blob and not wrong:
            wrong = await _compare(layer, blob, compression, self.limits)
        return wrong if self._layers.get(chain_id) is layer else ""

    async def usage(self, key: str) -> Usage:
        """What the snapshot ``key`` itself occupies, without the layers below it."""
        path = os.path.join(self._snapshot(key).path, "fs")
        try:
            return await asyncio.to_thread(file_tree.measure, path)
        except OSError as e:
            raise SnapshotError(f"cannot measure snapshot {key}: {e}") from e

    async def idmap_trouble(self) -> str:
        """Why snapshots cannot be mounted for a user namespace, "" where they can: tried once, where the layers are.

        It takes Linux 5.19 and a file system with id-mapped mounts.
        """
        if self._idmap_trouble is None:
            try:
                async with _user_namespace() as userns:
                    await self._in_mount_thread(self._try_idmap, userns)
                self._idmap_trouble = ""
            except (SnapshotError, OSError) as e:
                self._idmap_trouble = f"snapshots cannot be mounted for user namespaces: {e}"
        return self._idmap_trouble

    def _path(self, *names: str) -> str:
        return os.path.join(self._root, *names)

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
        """Make a chain of layers ready to be mounted: see snapshotter.implied. Raises SnapshotNotFoundError."""
        chain = self._chain(chain_id)
        if self._unsettled.isdisjoint(layer.chain_id for layer in chain):
            return
        async with self._settling:
            below: list[Layer] = []
            for layer in reversed(self._chain(chain_id)):
                if layer.chain_id in self._unsettled:
                    paths = [] if layer.opaque else [lower.path for lower in below]
                    try:
                        await self._in_mount_thread(implied.settle, layer.path, paths)
                    except OSError as e:
                        self._chain(chain_id)  # it may have been removed meanwhile
                        raise SnapshotError(f"layer {layer.chain_id} cannot be made ready: {e}") from e
                    self._unsettled.discard(layer.chain_id)
                below = [layer] if layer.opaque else [layer, *below]

    def _lower(self, chain_id: str) -> str:
        lower = []
        for layer in self._chain(chain_id):
            lower.append(f"{os.path.basename(layer.path)}/fs")
            if layer.opaque:
                # overlayfs does not look for the mark on a layer's root.
                break
        return ":".join(lower)

    def _load_layers(self) -> None:
        for name in sorted(os.listdir(self._path("layers"))):
            path = self._path("layers", name)
            try:
                meta = _read_meta(path)
                layer = Layer(**meta, path=path)
                if not _NUMBER.fullmatch(name) or layer.chain_id in self._layers:
                    raise ValueError("it is a duplicate or has no number")  # noqa: TRY301 - one end for all
            except (ValueError, TypeError) as e:
                self._drop(path, e)
            except OSError as e:
                log.warning("a layer cannot be read and is left as it is", path=path, error=str(e))
            else:
                self._layers[layer.chain_id] = layer
                if implied.are_in(path):
                    self._unsettled.add(layer.chain_id)

    def _load_snapshots(self) -> None:
        for key in os.listdir(self._path("active")):
            path = self._path("active", key)
            try:
                self._snapshots[key] = Snapshot(key, _read_meta(path)["chain_id"], path)
            except (ValueError, TypeError, KeyError) as e:
                self._drop(path, e)
            except OSError as e:
                log.warning("a snapshot cannot be read and is left as it is", path=path, error=str(e))

    def _drop(self, path: str, reason: Exception) -> None:
        log.warning("dropped, as its metadata is unusable", path=path, error=str(reason))
        try:
            self._retire(path)
        except SnapshotError as e:
            log.warning("what was dropped stays where it is", error=str(e))

    def _retire(self, path: str, key: str = "") -> str:
        """Move a layer or snapshot into staging, under a name that is returned, to be deleted there.

        Nothing is made for it: there may be no room left. Raises SnapshotError.
        """
        name = f"removed-{secrets.token_hex(8)}{key}"
        try:
            os.rename(path, self._path("staging", name))
        except OSError as e:
            raise SnapshotError(f"{path} cannot be removed: {e}") from e
        return name

    def _delete(self, name: str) -> None:
        """Delete ``name`` in staging. Raises SnapshotError with what hinders it; the next start tries again."""
        try:
            removal.remove_path(self._path("staging", name))
        except OSError as e:
            raise SnapshotError(f"{self._path('staging', name)} cannot be deleted: {e}") from e

    def _discard(self, area: str) -> None:
        """Delete an area of staging that is not needed any more; what cannot be deleted is left to the next start."""
        try:
            self._delete(os.path.basename(area))
        except SnapshotError as e:
            log.warning("something is left in staging", error=str(e))

    def _land(self, chain_id: str, flight: _Flight) -> None:
        if self._flights.get(chain_id) is flight:
            del self._flights[chain_id]

    async def _unpack(
        self, blob: str, compression: str, diff_id: str, chain_id: str, parent: str | None, arrival: Arrival | None
    ) -> Layer:
        unpacked = await arrival.result() if arrival else None
        if unpacked is None:
            async with self._slots:
                try:
                    with open(blob, "rb") as file:
                        unpacked = await self._make(file, compression, diff_id)
                except OSError as e:
                    raise SnapshotError(f"cannot unpack layer {diff_id}: {e}") from e
        area, made = unpacked
        meta = {"chain_id": chain_id, "diff_id": diff_id, "parent": parent, **made}
        path = self._path("layers", str(next(self._numbers)))
        try:
            _write_meta(area, meta)
            os.rename(area, path)
        except OSError as e:
            await in_thread(self._discard, area)
            raise SnapshotError(f"cannot commit layer {diff_id}: {e}") from e
        layer = self._layers[chain_id] = Layer(**meta, path=path)
        if implied.are_in(path):
            self._unsettled.add(chain_id)
        return layer

    async def _make(self, blob: BinaryIO, compression: str, diff_id: str, told: int | None = None) -> Unpacked:
        """Unpack a blob in a directory of its own in staging, of which nothing is left where that fails."""
        area = tempfile.mkdtemp(dir=self._path("staging"))
        try:
            _make_root(area, 0, 0, 0o755)
            options = {
                "compression": compression,
                "diff_id": diff_id,
                "limits": self.limits._asdict(),
                "daemon": os.getpid(),
                "told": told,
            }
            try:
                return area, await self._run_worker(area, blob, options)
            except SnapshotError as e:
                raise type(e)(f"layer {diff_id}: {e}") from e
            except OSError as e:
                raise SnapshotError(f"cannot unpack layer {diff_id}: {e}") from e
        except BaseException:
            await in_thread(self._discard, area)
            raise

    async def _run_worker(self, area: str, blob: BinaryIO, options: dict[str, Any]) -> dict[str, Any]:
        told = options["told"]
        async with _answered_marks(area) as theirs:
            passed = [theirs.fileno(), *([] if told is None else [told])]
            process = await _start(_WORKER, {**options, "marks": theirs.fileno()}, blob, area, passed)
            theirs.close()
            output, complaint = await self._supervise(process, blob)
        result = _result("the unpack worker", process, output, complaint)
        if "error" in result:
            raise _WORKER_ERRORS.get(result["error"], SnapshotError)(result["message"])
        return result

    async def _supervise(self, process: asyncio.subprocess.Process, blob: BinaryIO) -> tuple[bytes, bytes]:
        """What the worker writes to its output and its error output; it has ended then, by itself or not."""
        limits = self.limits
        outputs = asyncio.create_task(_outputs(process))
        try:
            async with asyncio.timeout(limits.max_seconds):
                seen = _progress(process.pid, blob)
                while not (await asyncio.wait([outputs], timeout=limits.max_stall))[0]:
                    before, seen = seen, _progress(process.pid, blob)
                    if before == seen:
                        raise SnapshotError(f"the unpack worker did nothing for {limits.max_stall:g} seconds")
            return outputs.result()
        except TimeoutError:
            raise SnapshotError(f"unpacking took longer than {limits.max_seconds:g} seconds") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            outputs.cancel()

    async def _mount(
        self, target: str, options: str, flags: int, snapshot: Snapshot | None = None, userns: str | None = None
    ) -> None:
        if len(os.fsencode(options)) > _MAX_OPTIONS:
            raise SnapshotError(f"cannot mount {target}: its layers do not fit into one page of options")
        place = os.path.abspath(target)
        try:
            if snapshot is None or userns is None:
                await self._in_mount_thread(_mount_overlay, place, options, flags, snapshot)
            else:
                await self._in_mount_thread(self._mount_mapped, place, options, flags, snapshot, userns)
        except asyncio.CancelledError:
            await self._in_mount_thread(_unmount, place)
            raise

    def _mount_mapped(self, target: str, options: str, flags: int, snapshot: Snapshot, userns: str) -> None:
        top = os.path.basename(self._layers[snapshot.chain_id].path)
        try:
            with self._mapped(self._path("layers"), userns):
                _map_root(snapshot, os.path.join(top, "fs"))
                _mount_overlay(target, options, flags, snapshot)
        except (SnapshotError, OSError) as e:
            raise SnapshotError(
                f"no mount for the user namespace {userns}, which takes Linux 5.19 or newer and a file system with "
                f"id-mapped mounts below {self._root}: {e}"
            ) from e

    def _try_idmap(self, userns: str) -> None:
        area = tempfile.mkdtemp(dir=self._path("staging"))
        try:
            for name in ("one", "two", "target"):
                os.mkdir(os.path.join(area, name))
            target = os.path.join(area, "target")
            with self._mapped(area, userns):
                _mount_overlay(target, "lowerdir=one:two", mounts.MS_RDONLY, None)
            _unmount(target)
        finally:
            self._discard(area)

    @contextmanager
    def _mapped(self, source: str, userns: str) -> Iterator[None]:
        """Be, in this thread, in the directory ``source`` with its files' owners mapped into a user namespace.

        It is seen so through a mount in staging/, which is gone afterwards: an overlay has copies of its own.
        """
        point = tempfile.mkdtemp(dir=self._path("staging"))
        try:
            mounts.bind_idmapped(source, point, userns, mounts.MOUNT_ATTR_RDONLY)
            try:
                os.chdir(point)
                yield
            finally:
                os.chdir(self._path("layers"))
                _unmount(point)
        finally:
            os.rmdir(point)

    async def _in_mount_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Run a call where relative names start at layers/."""
        return await in_thread(call, *arguments, executor=self._mount_threads)

    def _enter_layers(self) -> None:
        # Without it the directory would be the whole daemon's.
        mounts.unshare(mounts.CLONE_FS)
        os.chdir(self._path("layers"))


def _mount_overlay(target: str, options: str, flags: int, snapshot: Snapshot | None) -> None:
    try:
        if snapshot is not None:
            _forget_volatile(os.path.join(snapshot.path, "work"))
        mounts.mount("overlay", target, "overlay", flags, options)
    except OSError as e:
        raise SnapshotError(f"cannot mount the overlay on {target}: {e.strerror} ({options})") from e


def _forget_volatile(work: str) -> None:
    """Remove the mark of an earlier volatile mount, which forbids another one (work/incompat/volatile).

    What it warns of is a crash of the node between the two.
    """
    fd = os.open(work, _DIRECTORY)
    try:
        inner = os.open("work", _DIRECTORY, dir_fd=fd)
    except FileNotFoundError:
        return
    finally:
        os.close(fd)
    try:
        removal.remove(inner, "incompat")
    finally:
        os.close(inner)


def _map_root(snapshot: Snapshot, top: str) -> None:
    """Give a snapshot's root directory the owner that the image's has in ``top``, where owners are mapped.

    Only before the first mount, which makes work/work: afterwards the directory is the container's.
    """
    if not os.path.exists(os.path.join(snapshot.path, "work", "work")):
        status = os.stat(top)
        os.chown(os.path.join(snapshot.path, "fs"), status.st_uid, status.st_gid)


@asynccontextmanager
async def _user_namespace() -> AsyncIterator[str]:
    """A user namespace for a moment, in which user and group 0 are the node's 1; yields its file."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", _USERNS_MAKER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={},
    )
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(_USERNS_SECONDS):
                told = await process.stdout.read(2)
        except TimeoutError:
            raise SnapshotError(f"the kernel did not make a user namespace within {_USERNS_SECONDS:g} s") from None
        if told != b"0":
            raise SnapshotError("the kernel makes no user namespace")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process.pid}/{name}", "w") as file:
                file.write("0 1 1")
        yield f"/proc/{process.pid}/ns/user"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _unmount(target: str) -> None:
    try:
        mounts.unmount(target)
    except OSError as e:
        raise SnapshotError(f"cannot unmount {target}: {e.strerror}") from e


def _make_root(area: str, uid: int, gid: int, mode: int) -> None:
    path = os.path.join(area, "fs")
    os.mkdir(path, 0o700)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


async def _start(
    program: str, options: dict[str, Any], blob: BinaryIO, directory: str, pass_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    """Start one of this package's programs in a layer's ``directory``."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", program, json.dumps(options), *_WORKER_PATHS),
        stdin=blob,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=directory,
        env={},
        pass_fds=pass_fds,
    )


def _result(what: str, process: asyncio.subprocess.Process, output: bytes, complaint: bytes) -> dict[str, Any]:
    """The object that such a program has printed. Raises SnapshotError where it ended without one."""
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        words = complaint.decode("utf-8", "backslashreplace").strip()[-2000:]
        raise SnapshotError(f"{what} ended with status {process.returncode}: {words}") from None
    return result


async def _compare(layer: Layer, blob: str, compression: str, limits: Limits) -> str:
    """How the files of a layer differ from its blob."""
    options = {
        "compression": compression,
        "diff_id": layer.diff_id,
        "limits": limits._asdict(),
        "daemon": os.getpid(),
    }
    try:
        with open(blob, "rb") as file:
            process = await _start(_CHECKER, options, file, layer.path)
    except OSError:
        return ""  # it is gone, or its blob is
    try:
        output, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return "; ".join(_result("the layer checker", process, output, complaint).get("differences", []))


def _check_record(layer: Layer) -> str:
    try:
        if Layer(**_read_meta(layer.path), path=layer.path) != layer:
            return f"the metadata in {layer.path} is another layer's"
        os.close(os.open(os.path.join(layer.path, "fs"), _DIRECTORY))
    except (ValueError, TypeError) as e:
        return f"the metadata in {layer.path} is unusable: {e}"
    except OSError as e:
        return f"{layer.path} cannot be read: {e.strerror}"
    return ""


def _write_meta(area: str, meta: dict[str, Any]) -> None:
    with open(os.path.join(area, _META), "w", encoding="utf-8") as file:
        json.dump(meta, file)


def _read_meta(path: str) -> dict[str, Any]:
    """The metadata of a layer or snapshot. Raises ValueError where it is missing or no JSON object."""
    try:
        with open(os.path.join(path, _META), encoding="utf-8") as file:
            meta = json.load(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError("no metadata") from None
    if not isinstance(meta, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - one class for all that a file may say wrongly
    return meta


def _progress(pid: int, blob: BinaryIO) -> tuple[int, str]:
    """Something that changes while a worker does anything: how far it has read, and the CPU time that it has taken."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0, "ended"
    return os.lseek(blob.fileno(), 0, os.SEEK_CUR), " ".join(fields[11:13])  # utime, stime (proc_pid_stat(5))


@asynccontextmanager
async def _answered_marks(area: str) -> AsyncIterator[socket.socket]:
    """A worker's end of a socket at whose other end its opaque marks are set, below ``area``, while the block lasts."""
    device = os.stat(area).st_dev
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)

        def answer() -> None:
            if not marks.answer(ours, device):
                loop.remove_reader(ours)

        loop.add_reader(ours, answer)
        try:
            yield theirs
        finally:
            loop.remove_reader(ours)


async def _outputs(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """What a program writes to its output and its error output until it has ended."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, complaint, _ = await asyncio.gather(
        _read_bounded(process.stdout), _read_bounded(process.stderr), process.wait()
    )
    return output, complaint


async def _read_bounded(stream: asyncio.StreamReader) -> bytes:
    """All of a stream, of which the last _MAX_OUTPUT bytes are kept."""
    kept = b""
    while piece := await stream.read(_MAX_OUTPUT):
        kept = (kept + piece)[-_MAX_OUTPUT:]
    return kept
