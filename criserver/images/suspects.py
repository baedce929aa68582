"""Blobs and layers that a power cut may have damaged, and the sync that keeps them few.

1. A blob or layer is a suspect if it was committed after the last sync before an unclean boot (see sync_note).
2. A suspect is checked before it is used. A damaged one is removed, so that its user fetches or unpacks it anew.
3. :meth:`Suspects.sync` syncs what was committed since the last time. It is called from time to time and at the stop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable
from weakref import WeakValueDictionary

import structlog

from criserver.boot import boot_id
from criserver.errors import CriError
from criserver.images import sync_note
from criserver.images.content import ContentStore
from criserver.images.sync_note import Note
from snapshotter import SnapshotError, Snapshotter, mounts
from snapshotter.threads import in_loose_thread, in_thread

_log = structlog.get_logger(__name__)


class Suspects:
    """The suspects among a node's content. Without the path of a ``note`` there are none, and nothing is synced.

    ``blobs`` and ``layers`` have their digests and chain IDs. ``damaged`` has those that were damaged and removed.
    """

    def __init__(self, content: ContentStore, snapshotter: Snapshotter, note: str = "") -> None:
        self._content = content
        self._snapshotter = snapshotter
        self._note = note
        self._boot = boot_id() if note else ""
        self._written = sync_note.read(note) if note else None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._syncing = threading.Lock()
        self._synced: tuple[int, int] | None = None  # commits of both stores when the note was written
        self._unsynced: dict[str, str] = {}  # files that a failed sync may have lost, with their stamps
        self.unclean = sync_note.is_unclean(self._written, self._boot)
        self.blobs: set[str] = set()
        self.layers: set[str] = set()
        self.damaged: set[str] = set()
        if self.unclean and self._written is not None:
            present = self._present()
            self.blobs = {d for d, found in present.blobs.items() if self._written.blobs.get(d) != found}
            self.layers = {c for c, found in present.layers.items() if self._written.layers.get(c) != found}
            if self.blobs or self.layers:
                _log.warning(
                    "the last boot had no orderly end; new image content is checked before its first use",
                    blobs=len(self.blobs),
                    layers=len(self.layers),
                )

    def concern(self, blobs: Iterable[str], layers: Iterable[str]) -> bool:
        """Whether some of these blobs and layers are suspects."""
        return not (self.blobs.isdisjoint(blobs) and self.layers.isdisjoint(layers))

    async def check_blob(self, digest: str) -> None:
        """Check a blob if it is a suspect. After that it is sound, or it is not in the store any more.

        Raises OSError if it cannot be checked now, or if a damaged blob cannot be deleted.
        """
        if digest not in self.blobs:
            return
        async with self._lock(f"blob {digest}"):
            if digest not in self.blobs:
                return
            wrong = await in_thread(self._content.check, digest)
            if wrong and self._content.size(digest) is not None:
                _log.warning("blob removed after an unclean boot, as it is damaged", digest=digest, reason=wrong)
                self.damaged.add(digest)
                await self._content.delete(digest)
            self.blobs.discard(digest)

    async def check_layer(self, chain_id: str, blob: str, compression: str) -> None:
        """Check a layer with its sound ``blob`` if it is a suspect. After that it is sound, or not there any more.

        Raises OSError if it cannot be checked now, CriError if a damaged layer cannot be removed.
        """
        if chain_id not in self.layers:
            return
        async with self._lock(f"layer {chain_id}"):
            if chain_id not in self.layers:
                return
            wrong = await self._snapshotter.compare_layer(chain_id, self._content.path(blob), compression)
            if self._snapshotter.layer(chain_id) is None:
                self.damaged.add(chain_id)  # its metadata was damaged: the snapshotter has dropped it at the start
            elif wrong:
                _log.warning("layer removed after an unclean boot, to be unpacked anew", layer=chain_id, reason=wrong)
                self.damaged.add(chain_id)
                try:
                    await self._snapshotter.drop_layer(chain_id)
                except SnapshotError as e:
                    raise CriError(f"layer {chain_id} is damaged: {e}") from e
            self.layers.discard(chain_id)

    def forget_gone(self, needed_layers: set[str]) -> None:
        """Forget suspects that were deleted meanwhile, other than missing layers that images need."""
        self.blobs &= self._content.digests()
        self.layers &= self._snapshotter.layers().keys() | needed_layers

    async def sync(self) -> None:
        """Sync what was committed since the last sync, and note it. It works in a thread of its own.

        So a disk that stands still keeps no other thread waiting, and does not keep the daemon from its end. Raises
        OSError.
        """
        commits = self._content.commits, self._snapshotter.commits
        unchecked = bool(self.blobs or self.layers)
        current = self._written is not None and self._written.boot == ("" if unchecked else self._boot)
        if self._note and not (current and commits == self._synced):
            await in_loose_thread(lambda: self._sync(commits, unchecked), "sync")

    def _sync(self, commits: tuple[int, int], unchecked: bool) -> None:
        with self._syncing:
            present = self._present()  # before the sync: what is committed during it may not be on disk
            try:
                roots = (self._content.root, self._snapshotter.root)
                for path in {os.stat(root).st_dev: root for root in roots}.values():
                    mounts.syncfs(path)
            except OSError:
                # The kernel reports a failed write once. The next sync succeeds, although the data is lost.
                known = self._written or Note()
                for now, before in ((present.blobs, known.blobs), (present.layers, known.layers)):
                    self._unsynced.update((key, found) for key, found in now.items() if before.get(key) != found)
                raise
            note = Note(
                "" if unchecked else self._boot,
                {d: s for d, s in present.blobs.items() if d not in self.blobs and self._unsynced.get(d) != s},
                {c: s for c, s in present.layers.items() if c not in self.layers and self._unsynced.get(c) != s},
            )
            sync_note.write(self._note, note)
            self._written, self._synced = note, commits

    def _present(self) -> Note:
        """The stamps of all blobs and layers that are there. Blocks."""
        blobs = {digest: sync_note.stamp(self._content.path(digest)) for digest in self._content.digests()}
        layers = {
            layer.chain_id: sync_note.stamp(os.path.join(layer.path, "meta.json"))
            for layer in list(self._snapshotter.layers().values())
        }
        return Note(
            blobs={digest: found for digest, found in blobs.items() if found},
            layers={chain_id: found for chain_id, found in layers.items() if found},
        )

    def _lock(self, what: str) -> asyncio.Lock:
        """One check of a thing at a time. The lock exists while a check refers to it."""
        lock = self._locks.get(what)
        if lock is None:
            lock = self._locks[what] = asyncio.Lock()
        return lock
