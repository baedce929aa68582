"""The content store: blobs in files that are named by their digest and never change.

``blobs/ALGORITHM/HEX`` has the verified blobs. ``ingest/`` has blobs that are being written or deleted, and is emptied
at the start. Nothing is synced, as an fsync for each layer would slow down every pull:

1. A SIGKILL of the daemon does not affect the page cache.
2. After a power cut a blob may have a wrong size, which the start finds by the manifest that names it. Or it may have a
   wrong content: see criserver.images.suspects.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import BinaryIO, Protocol

import structlog

from criserver.errors import CriError, DataLossError, NotFoundError, ResourceExhaustedError
from criserver.images.digests import ALGORITHMS, digest_of, is_digest, new_hash, written
from snapshotter import removal
from snapshotter.errors import raise_lack
from snapshotter.files import make_private
from snapshotter.threads import in_thread

_log = structlog.get_logger(__name__)

_BLOCK = 4096
_PIECE = 1 << 20


class ContentStore:
    """Blobs under the directory ``root``, for one daemon at a time.

    Methods that take a digest expect one for which :func:`~criserver.images.digests.is_digest` holds.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.commits = 0  # blobs committed by this object
        self._blobs = os.path.join(root, "blobs")
        self._ingest = os.path.join(root, "ingest")
        self._numbers = count()
        # Two renames of one blob, into the store and out of it, must come one after the other.
        self._renaming = asyncio.Lock()
        self._arriving: set[Ingest] = set()
        # Files of blobs that were not committed. Their deletion has failed.
        self._rest: set[str] = set()
        for directory in (*(os.path.join(self._blobs, name) for name in ALGORITHMS), self._ingest):
            make_private(directory)
        for name in os.listdir(self._ingest):
            _sweep(os.path.join(self._ingest, name))
        self._sizes: dict[str, int] = {}
        for algorithm in ALGORITHMS:
            self._find(algorithm)
        self._bytes = sum(map(_occupied, self._sizes.values()))

    def _find(self, algorithm: str) -> None:
        """Add the blobs on disk whose digests are of an algorithm."""
        with os.scandir(os.path.join(self._blobs, algorithm)) as entries:
            for entry in entries:
                digest = f"{algorithm}:{entry.name}"
                if not is_digest(digest):
                    continue
                if entry.is_file(follow_symlinks=False):
                    self._sizes[digest] = entry.stat(follow_symlinks=False).st_size
                else:
                    _sweep(entry.path)  # or the blob could never be committed

    def digests(self) -> set[str]:
        """The digests of all blobs."""
        return set(self._sizes)

    def size(self, digest: str) -> int | None:
        """The blob's size in bytes, or None where it is not there."""
        return self._sizes.get(digest)

    def path(self, digest: str) -> str:
        """The path of a blob's file, which may be missing. Nobody may write to the file."""
        return os.path.join(self._blobs, *digest.split(":"))

    def open(self, digest: str) -> BinaryIO:
        """The blob for reading; its content is not checked again. Raises NotFoundError, OSError."""
        try:
            return open(self.path(digest), "rb")
        except FileNotFoundError:
            raise NotFoundError(f"blob {digest} is not in the content store") from None

    def read(self, digest: str, limit: int) -> bytes:
        """The whole of a small blob, checked against its digest.

        Raises NotFoundError, ResourceExhaustedError if it is larger than ``limit`` bytes, DataLossError, and OSError if
        the node has no descriptors or memory left, which says nothing of the blob.
        """
        try:
            with self.open(digest) as f:
                data = f.read(limit + 1)
        except OSError as e:
            raise_lack(e)
            raise DataLossError(f"blob {digest} cannot be read from the disk: {e.strerror}") from e
        if len(data) > limit:
            raise ResourceExhaustedError(f"blob {digest} is larger than {limit} bytes")
        if (found := digest_of(data, digest)) != digest:
            raise DataLossError(f"blob {digest} is damaged on disk: its content has digest {found}")
        return data

    def check(self, digest: str, go_on: Callable[[int], bool] = lambda _: True) -> str:
        """What is wrong with a blob on disk, its size or its content; "" if nothing is. Blocks.

        ``go_on`` is told of each piece's length. If it returns False, the check ends, and returns "". Raises OSError if
        the node has no descriptors or memory left, which says nothing of the blob.
        """
        size = self.size(digest)
        found = new_hash(digest)
        length = 0
        try:
            with open(self.path(digest), "rb", buffering=0) as file:
                if (there := os.fstat(file.fileno()).st_size) != size:
                    return f"it has {there} bytes in place of {size}"
                # Read from the disk, not from the page cache, and do not fill the cache.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(_PIECE):
                    found.update(piece)
                    length += len(piece)
                    if not go_on(len(piece)):
                        return ""
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            return f"it cannot be read: {e.strerror}"
        if length != size:
            return f"it has {length} bytes in place of {size}"
        if written(found) != digest:
            return f"its content has digest {written(found)}"
        return ""

    async def put(self, data: bytes, like: str = "") -> str:
        """Store a small blob, such as a manifest, and return its digest. ``like`` is one of the same algorithm."""
        digest = digest_of(data, like)
        async with self.ingest(digest) as ingest:
            await ingest.write(data)
            await ingest.commit(digest)
        return digest

    @asynccontextmanager
    async def ingest(self, digest: str = "", watcher: Watcher | None = None) -> AsyncIterator[Ingest]:
        """A new blob that is written while the block lasts. It is deleted at the end if it is not committed.

        ``digest`` is the one that it is to have, if that is known: it is then hashed by that algorithm, and
        :meth:`arrived` says how much of it has arrived. ``watcher`` is told how it grows.
        """
        path = os.path.join(self._ingest, str(next(self._numbers)))
        ingest = Ingest(self, path, digest, watcher)
        self._arriving.add(ingest)
        try:
            await in_thread(ingest.open)
            yield ingest
        finally:
            self._arriving.remove(ingest)
            await in_thread(ingest.close)

    async def delete_rest(self) -> None:
        """Delete the files whose own deletion has failed. One that still cannot be deleted is logged."""
        for path in list(self._rest):
            await in_thread(self._discard, path)

    def _discard(self, path: str) -> None:
        self._rest.add(path)
        if _sweep(path):
            self._rest.remove(path)

    def scratch(self) -> BinaryIO:
        """A file without a name, for bytes that are no blob. Raises CriError, ResourceExhaustedError."""
        try:
            return tempfile.TemporaryFile(dir=self._ingest, buffering=0)
        except OSError as e:
            raise _failure(e, self._ingest) from e

    def arrived(self, digest: str) -> int:
        """How many bytes of a blob are here, also if it is still arriving."""
        arriving = (ingest.size for ingest in self._arriving if ingest.digest == digest)
        return self._sizes.get(digest) or max(arriving, default=0)

    async def delete(self, digest: str) -> int:
        """Delete a blob and return the bytes that it occupied. It is no error if it is missing.

        The blob is out of the store at once; a thread then deletes the file, which takes long for a large one. If that
        fails, the blob is in the store again, and OSError is raised.
        """
        path = os.path.join(self._ingest, str(next(self._numbers)))
        size = self._sizes.pop(digest, None)
        if size is None:
            return 0
        self._bytes -= _occupied(size)
        try:
            async with self._renaming:
                if digest in self._sizes:
                    return 0  # a pull has brought it anew
                await in_thread(os.rename, self.path(digest), path)
            await asyncio.to_thread(removal.remove_path, path)
        except FileNotFoundError:
            return 0
        except OSError:
            # Without this, nothing would try again before the next start. A pull may have brought the blob meanwhile.
            for place in (path, self.path(digest)):
                if os.path.isfile(place):
                    await self._commit(place, digest, size)
                    break
            raise
        return _occupied(size)

    def usage(self) -> tuple[int, int]:
        """What all blobs occupy, with those that are still arriving: bytes in whole blocks, and inodes."""
        arriving = [_occupied(ingest.size) for ingest in self._arriving if not ingest.committed]
        return self._bytes + sum(arriving), len(self._sizes) + len(arriving)

    async def _commit(self, source: str, digest: str, size: int) -> None:
        async with self._renaming:
            try:
                await in_thread(os.rename, source, self.path(digest))
            finally:
                # Also where the caller was cancelled after it.
                if not os.path.exists(source):
                    self._committed(digest, size)

    def _committed(self, digest: str, size: int) -> None:
        if digest not in self._sizes:
            self._sizes[digest] = size
            self._bytes += _occupied(size)
        self.commits += 1


class Watcher(Protocol):
    """Is told how a blob grows."""

    def grown(self, path: str, size: int) -> None:
        """The file ``path`` has the first ``size`` bytes of the blob, which are not verified yet."""

    def reset(self) -> None:
        """The content so far was wrong: the blob begins anew."""


class Ingest:
    """A blob that is being written; made by :meth:`ContentStore.ingest`.

    All that waits for the disk is done in threads. :meth:`open` and :meth:`close` are called once, by the store.
    """

    def __init__(self, store: ContentStore, path: str, digest: str, watcher: Watcher | None) -> None:
        self._store = store
        self._path = path
        self.digest = digest
        self._watcher = watcher
        self._fd = -1
        self._hash = new_hash(self.digest)
        self.size = 0
        self.committed = False

    def open(self) -> None:
        """Make the file. Blocks. Raises CriError, ResourceExhaustedError if the disk is full."""
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise _failure(e, self._path) from e

    async def write(self, data: bytes) -> None:
        """Append. When this returns or raises, also by a cancellation, no thread writes any more.

        Raises ResourceExhaustedError if the disk is full.
        """
        await in_thread(self._add, data)
        if self._watcher is not None:
            self._watcher.grown(self._path, self.size)

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as e:
            raise _failure(e, self._path) from e
        self.size += len(data)

    async def reset(self) -> None:
        """Delete the content so far: the blob begins anew."""
        await in_thread(os.ftruncate, self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = new_hash(self.digest)
        self.size = 0
        if self._watcher is not None:
            self._watcher.reset()

    async def commit(self, digest: str) -> None:
        """Make the blob part of the store. Raises DataLossError if its content has another digest."""
        found = written(self._hash)
        if found != digest:
            raise DataLossError(f"blob {digest}: the content received has digest {found}")
        try:
            await self._store._commit(self._path, digest, self.size)
        finally:
            # Also where the caller was cancelled after it.
            self.committed = not os.path.exists(self._path)

    def close(self) -> None:
        """Close the file, and delete it if it is not committed. Blocks.

        A deletion that fails is logged, and :meth:`ContentStore.delete_rest` tries it again.
        """
        if self._fd < 0:
            return
        os.close(self._fd)
        if not self.committed:
            self._store._discard(self._path)


def _sweep(path: str) -> bool:
    """Delete a file that should not be there, and return whether it is gone. A failure is logged."""
    try:
        removal.remove_path(path)
    except OSError as e:
        _log.warning("a deletion in the content store failed", path=path, error=str(e))
        return False
    return True


def _occupied(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _failure(error: OSError, path: str) -> CriError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError(f"no space for image content at {path}; remove images or enlarge the file system")
    return CriError(f"image content cannot be written to {path}: {error.strerror}")
