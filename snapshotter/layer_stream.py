"""From a layer's blob to its tar stream: decompressed and bounded in one thread, hashed in another.

Decompression and hashing release the interpreter's lock, so they run at the same time as the unpacker's system calls.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from isal import isal_zlib

from snapshotter.errors import LayerError, LimitError, TruncatedLayerError, no_thread
from snapshotter.limits import LayerLimits

_INPUT = 128 << 10
_NOTES = 4096
_OUTPUT = 512 << 10
_AHEAD = 4  # pieces
_GZIP = 31  # window bits: a gzip header, and the largest window
# The largest window of a zstd frame, which is level 22's. A decoder allocates the size that the frame's header says;
# levels up to 19 say 8 MiB.
_MAX_WINDOW = 128 << 20
_MAGIC = 4
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((n, 0x2A, 0x4D, 0x18)) for n in range(0x50, 0x60)))  # skippable frames

COMPRESSIONS = frozenset({"none", "gzip", "zstd"})
Decoder = Callable[[BinaryIO, Callable[[int], None]], Iterator[bytes]]


def decoder(blob: BinaryIO, compression: str) -> Decoder:
    """The function that makes a tar stream of a blob, whose position is at its start.

    It is to be called before the worker is confined, as it imports the decoder. Builders give wrong media types to
    compressed layers, so the first bytes of a layer count if its type says any compression.
    """
    if compression == "none":
        return _plain
    start = b""
    while len(start) < _MAGIC and (more := blob.read(_MAGIC - len(start))):
        start += more
    blob.seek(0)
    if start.startswith(_GZIP_MAGIC):
        return _gunzip
    if start in _ZSTD_MAGICS:
        return _make_unzstd()
    return _plain


def _plain(file: BinaryIO, count: Callable[[int], None]) -> Iterator[bytes]:
    while data := file.read(_OUTPUT):
        count(len(data))
        yield data


def _gunzip(file: BinaryIO, count: Callable[[int], None]) -> Iterator[bytes]:
    """The members of a gzip file one after the other (RFC 1952, section 2.2); zeros after the last are padding."""
    member = isal_zlib.decompressobj(wbits=_GZIP)
    while data := file.read(_INPUT):
        count(len(data))
        while data:
            if member.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                member = isal_zlib.decompressobj(wbits=_GZIP)
            # The output is bounded: a block of zeros must not become a gigabyte in memory.
            if inflated := member.decompress(data, _OUTPUT):
                yield inflated
            data = member.unused_data if member.eof else member.unconsumed_tail
    while not member.eof:
        inflated = member.decompress(b"", _OUTPUT)
        if not inflated:
            raise TruncatedLayerError("the layer's gzip stream ends early")
        yield inflated


def _make_unzstd() -> Decoder:
    # The import takes 10 ms, so only workers that need it do it.
    import zstandard

    def unzstd(file: BinaryIO, count: Callable[[int], None]) -> Iterator[bytes]:
        """The frames of a zstd file one after the other (RFC 8878, section 3), without the skippable ones."""
        inflater = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        counted: Any = _Counted(file, count)  # zstandard calls read() alone
        reader = inflater.stream_reader(counted, read_size=_INPUT, read_across_frames=True)
        try:
            while inflated := reader.read(_OUTPUT):
                yield inflated
        except zstandard.ZstdError as e:
            raise LayerError(f"the layer is not valid zstd data: {e}") from e

    return unzstd


class Arriving:
    """A blob that is still being written. A read at its present end waits.

    ``told`` is a pipe: the daemon writes to it when the blob has grown, and closes it when the blob is whole.
    """

    def __init__(self, blob: BinaryIO, told: int) -> None:
        self._blob = blob
        self._told = told
        self._whole = False

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, and at least one before the end."""
        while not (data := self._blob.read(size)) and not self._whole:
            self._whole = not os.read(self._told, _NOTES)
        return data

    def seek(self, offset: int) -> None:
        """Go on at ``offset``, which must be in the part that is there already."""
        self._blob.seek(offset)


class _Counted:
    """A file that reports how much is read of it."""

    def __init__(self, file: BinaryIO, count: Callable[[int], None]) -> None:
        self._file = file
        self._count = count

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._count(len(data))
        return data


class LayerStream:
    """The tar stream of a blob: call :meth:`read` until the end, then :meth:`digest`.

    Two threads work for it. Raises OSError if there is no room for them.
    """

    def __init__(self, blob: BinaryIO, decode: Decoder, limits: LayerLimits) -> None:
        self._limits = limits
        self._taken = 0
        self._pieces = decode(blob, self._count)
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
        self._to_hash: queue.Queue[bytes] = queue.Queue(_AHEAD)
        # Daemon threads: when the unpacker fails, the process must end while they wait.
        self._hasher = threading.Thread(target=self._digest, name="digest", daemon=True)
        try:
            threading.Thread(target=self._inflate, name="inflate", daemon=True).start()
            self._hasher.start()
        except RuntimeError as e:
            raise no_thread(e) from e

    def read(self) -> bytes:
        """The next piece; ``b""`` at the end. Raises LayerError for a stream that is broken or too large."""
        piece = self._queue.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def digest(self) -> str:
        """The digest of the whole stream, as ``sha256:<hex>``; to be called after the end."""
        self._hasher.join()
        return f"sha256:{self._hash.hexdigest()}"

    def _count(self, taken: int) -> None:
        self._taken += taken

    def _digest(self) -> None:
        while piece := self._to_hash.get():
            self._hash.update(piece)

    def _inflate(self) -> None:
        given = 0
        limits = self._limits
        try:
            for piece in self._pieces:
                given += len(piece)
                if given > limits.max_bytes:
                    raise LimitError(f"the layer is larger than {limits.max_bytes} bytes (max_bytes)")  # noqa: TRY301 - crosses to the reader
                if given > limits.ratio_floor and given > limits.max_ratio * self._taken:
                    raise LimitError(  # noqa: TRY301 - crosses to the reader
                        f"the layer unpacks to {given} bytes and more from {self._taken}: more than "
                        f"{limits.max_ratio} times as much (max_ratio)"
                    )
                self._queue.put(piece)
                self._to_hash.put(piece)
            self._to_hash.put(b"")
            self._queue.put(b"")
        except isal_zlib.IsalError as e:  # type: ignore[misc]  # declared as an instance in isal's stubs
            self._queue.put(LayerError(f"the layer is not valid gzip data: {e}"))
        except Exception as e:  # noqa: BLE001 - raised again by read()
            self._queue.put(e)
