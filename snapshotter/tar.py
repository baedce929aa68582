"""A tar reader for layers: one pass, no seeking, and no trust in the content.

It reads ustar, GNU (long names, base-256 numbers) and PAX (POSIX.1-2001 pax interchange format) with the SCHILY.xattr
records, and GNU's four formats of sparse files (tar manual, "Storing Sparse Files"). It makes no files; the unpacker
does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from snapshotter.errors import LayerError, LimitError, TruncatedLayerError, shown
from snapshotter.limits import LayerLimits
from snapshotter.tar_fields import (
    SPARSE_MAP,
    parse_decimal,
    parse_device,
    parse_identity,
    parse_number,
    parse_pax_records,
    parse_size,
    parse_time,
    verify_checksum,
)

BLOCK = 512

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_ZEROS = bytes(BLOCK)
_USTAR = b"ustar\0"  # a version comes after it, which some writers leave out
_MAX_PAX = 1 << 20
_MAX_EXTENSIONS = 16  # headers before one entry; real archives have up to three: x, L, K
_MAX_MAP = 1 << 20  # bytes of a sparse file's map
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_SPARSE_FLAG = b"S"
_OLD_MAP, _OLD_MORE, _OLD_SIZE = slice(386, 482), 482, slice(483, 495)  # in a header of GNU's first format
_NEXT_MAP, _NEXT_MORE = slice(0, 504), 504  # in the blocks after it

FILE = "file"
LINK = "hard link"
SYMLINK = "symbolic link"
DIRECTORY = "directory"
FIFO = "fifo"
CHARACTER = "character device"
BLOCK_DEVICE = "block device"

_KINDS = {
    b"\0": FILE,
    b"0": FILE,
    b"7": FILE,
    b"1": LINK,
    b"2": SYMLINK,
    b"3": CHARACTER,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
    _SPARSE_FLAG: FILE,
}


class Entry(NamedTuple):
    """One member: ``link`` is a link's target, ``mode`` has the permission bits only, ``mtime`` is in ns.

    ``size`` is the file's, ``device`` a device's number. ``extents`` of a sparse file are the offsets and lengths of
    its content, in order; all else is holes.
    """

    kind: str
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    xattrs: dict[bytes, bytes]
    extents: tuple[tuple[int, int], ...] | None = None
    device: int = 0


class TarReader:
    """The entries of a tar stream, in order.

    ``read`` returns the stream's next bytes, in pieces of any size, and ``b""`` at the end. Iterating yields each
    :class:`Entry`. Until the next entry, :meth:`content` yields its bytes. A stream may end after any entry, as for
    other readers, so a caller that needs the whole stream checks its digest.

    ``skip`` is for a caller that reads headers alone: it passes over so many bytes of content, and the padding after
    them. ``read`` must return one block of 512 bytes then, as what was read already cannot be passed over.

    Raises :class:`LayerError`, or :class:`TruncatedLayerError` if the stream ends within an entry.
    """

    def __init__(
        self, read: Callable[[], bytes], limits: LayerLimits, skip: Callable[[int], None] | None = None
    ) -> None:
        self._read = read
        self._skip = skip
        self._limits = limits
        self._piece = b""
        self._at = 0
        self._left = 0  # content of the current entry not yet taken
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries up to the end of the archive."""
        records: dict[bytes, bytes] = {}
        entries = extensions = 0
        while (header := self._next_header()) is not None:
            flag = header[156:157]
            if flag in b"xgLK":
                extensions += 1
                if extensions > _MAX_EXTENSIONS:
                    raise LayerError(f"more than {_MAX_EXTENSIONS} extended headers stand before one entry")
                self._read_extension(flag, parse_number(header[124:136], "size"), records)
                continue
            entries += 1
            if entries > self._limits.max_entries:
                raise LimitError(f"the layer has more than {self._limits.max_entries} entries (max_entries)")
            entry = self._entry(header, records)
            if entry.size > self._limits.max_bytes:
                raise LimitError(
                    f"entry {shown(entry.name)} has {entry.size} bytes; {self._limits.max_bytes} are the most that a "
                    "layer may unpack to (max_bytes)"
                )
            self._left = entry.size
            self._padding = -entry.size % BLOCK
            if flag == _SPARSE_FLAG or (records and any(key.startswith(_SPARSE) for key in records)):
                entry = self._sparse(header, entry, records)
            yield entry
            extensions = 0
            if records:
                records = {}
        if records:
            raise TruncatedLayerError("the tar stream ends after an extended header, before its entry")

    def content(self) -> Iterator[memoryview]:
        """Yield the rest of the current entry's content, in pieces of any size."""
        while self._left:
            if self._at == len(self._piece):
                self._refill()
            end = min(self._at + self._left, len(self._piece))
            taken = memoryview(self._piece)[self._at : end]
            self._left -= end - self._at
            self._at = end
            yield taken

    def drain(self) -> None:
        """Read the stream to its end, past the end of the archive."""
        while self._piece:
            self._piece = self._read()
        self._at = 0

    def _refill(self) -> None:
        self._piece = self._read()
        self._at = 0
        if not self._piece:
            raise TruncatedLayerError("the tar stream ends in the middle of an entry")

    def _take(self, size: int) -> bytes:
        taken = self._take_at_most(size)
        if len(taken) < size:
            raise TruncatedLayerError("the tar stream ends in the middle of an entry")
        return taken

    def _take_at_most(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer at the end of the stream."""
        end = self._at + size
        if end <= len(self._piece):
            taken = self._piece[self._at : end]
            self._at = end
            return taken
        parts = []
        while size:
            if self._at == len(self._piece):
                self._piece = self._read()
                self._at = 0
                if not self._piece:
                    break
            part = self._piece[self._at : self._at + size]
            self._at += len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _next_header(self) -> bytes | None:
        if self._skip is not None and self._left:
            self._skip(self._left)
            self._left = self._padding = 0
        for _ in self.content():
            pass
        padding, self._padding = self._padding, 0
        # Some writers leave out the last padding, and one or both of the blocks of zeros at the end. Go's reader takes
        # such archives.
        if len(self._take_at_most(padding)) < padding:
            return None
        header = self._take_at_most(BLOCK)
        if not header.strip(b"\0"):
            # The stream is not read again behind its end.
            if len(header) == BLOCK and self._take_at_most(BLOCK).strip(b"\0"):
                raise LayerError("a block of zeros stands among the entries")
            return None
        if len(header) < BLOCK:
            raise TruncatedLayerError("the tar stream ends in the middle of an entry")
        verify_checksum(header)
        return header

    def _read_extension(self, flag: bytes, size: int, records: dict[bytes, bytes]) -> None:
        """Add an extended header to ``records``, which are for the next entry.

        A global header (g), which is for all that follow, is read and left out. Other runtimes do so, and so do the
        programs that look into images for vulnerabilities. With its records an image would have other files than
        theirs.
        """
        limit = _MAX_PAX if flag in b"xg" else self._limits.max_name + 1
        if not 0 <= size <= limit:
            raise LayerError(f"an extended header of {size} bytes; {limit} are allowed")
        data = self._take(size)
        self._take(-size % BLOCK)
        if flag == b"L":
            records[b"path"] = data.rstrip(b"\0")
        elif flag == b"K":
            records[b"linkpath"] = data.rstrip(b"\0")
        else:
            update = parse_pax_records(data)
            if flag == b"x":
                records.update(update)

    def _entry(self, header: bytes, records: dict[bytes, bytes]) -> Entry:
        # fmt: off
        (name, mode, uid, gid, size, mtime, _, flag, link, magic,
         _, _, major, minor, prefix) = _HEADER.unpack(header)
        # fmt: on
        name = name.partition(b"\0")[0]
        if magic.startswith(_USTAR) and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        link = link.partition(b"\0")[0]
        if records:
            name = records.get(b"GNU.sparse.name") or records.get(b"path") or name
            link = records.get(b"linkpath") or link
        kind = _KINDS.get(flag)
        if kind is None:
            raise LayerError(f"entry {shown(name)} is of the unknown type {flag!r}, which is not supported in layers")
        if kind is FILE and name.endswith(b"/"):
            kind = DIRECTORY  # as tar wrote directories before ustar
        if len(name) > self._limits.max_name or len(link) > self._limits.max_name:
            raise LayerError(f"entry {shown(name)} has a name of more than {self._limits.max_name} bytes")
        if b"\0" in name or b"\0" in link:
            raise LayerError(f"entry {shown(name)} has a zero byte in its name")
        try:
            return Entry(
                kind,
                name,
                link,
                parse_number(mode, "mode") & 0o7777,
                parse_identity(uid, records.get(b"uid"), "owner"),
                parse_identity(gid, records.get(b"gid"), "group"),
                parse_size(size, records.get(b"size")) if kind is FILE else 0,
                parse_time(mtime, records.get(b"mtime")),
                {k[len(_XATTR) :]: v for k, v in records.items() if k.startswith(_XATTR)} if records else {},
                None,
                parse_device(major, minor) if kind is CHARACTER or kind is BLOCK_DEVICE else 0,
            )
        except LayerError as e:
            raise LayerError(f"entry {shown(name)}: {e}") from None

    def _sparse(self, header: bytes, entry: Entry, records: dict[bytes, bytes]) -> Entry:
        """Read the map of a sparse file, and return the entry with it."""
        try:
            if entry.kind is not FILE:
                raise LayerError("has the map of a sparse file and is none")  # noqa: TRY301 - named below
            if header[156:157] == _SPARSE_FLAG:
                numbers = self._old_map(header)
                size = parse_number(header[_OLD_SIZE], "size")
            elif records.get(b"GNU.sparse.major", b"0") == b"0":
                numbers = [parse_decimal(n, "map") for n in records.get(SPARSE_MAP, b"").split(b",") if n]
                size = parse_decimal(records.get(b"GNU.sparse.size", b""), "size")
            elif (records[b"GNU.sparse.major"], records.get(b"GNU.sparse.minor")) == (b"1", b"0"):
                numbers = self._inner_map()
                size = parse_decimal(records.get(b"GNU.sparse.realsize", b""), "size")
            else:
                raise LayerError("is a sparse file of an unknown format")  # noqa: TRY301 - named below
            if size > self._limits.max_bytes:
                raise LimitError(f"its {size} bytes are more than {self._limits.max_bytes} (max_bytes)")
            return entry._replace(size=size, extents=_extents(numbers, size, self._left))
        except LayerError as e:
            raise type(e)(f"entry {shown(entry.name)}: {e}") from None

    def _old_map(self, header: bytes) -> list[int]:
        """The map of GNU's first format, which is in the header and in blocks after it."""
        parts = [header[_OLD_MAP]]
        more = header[_OLD_MORE]
        while more:
            if len(parts) * BLOCK > _MAX_MAP:
                raise LayerError(f"its map has more than {_MAX_MAP} bytes")
            block = self._take(BLOCK)
            parts.append(block[_NEXT_MAP])
            more = block[_NEXT_MORE]
        fields = b"".join(parts)
        numbers: list[int] = []
        for at in range(0, len(fields), 24):
            if not fields[at]:
                break
            numbers += parse_number(fields[at : at + 12], "map"), parse_number(fields[at + 12 : at + 24], "map")
        return numbers

    def _inner_map(self) -> list[int]:
        """The map of PAX's format 1.0, which is before the content: a line with the number of pairs, then the pairs."""
        data = bytearray()
        lines, wanted = 0, 1
        while lines < wanted:
            if self._left < BLOCK or len(data) >= _MAX_MAP:
                raise LayerError("its map does not end where its content begins")
            block = self._take(BLOCK)
            self._left -= BLOCK
            first = not lines
            lines += block.count(b"\n")
            data += block
            if first and lines:
                wanted = 1 + 2 * parse_decimal(bytes(data[: data.index(b"\n")]), "map")
        return [parse_decimal(number, "map") for number in bytes(data).split(b"\n", wanted)[1:wanted]]


def _extents(numbers: list[int], size: int, stored: int) -> tuple[tuple[int, int], ...]:
    """The checked map of a file of ``size`` bytes, of which ``stored`` are in the stream."""
    extents = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    at = total = 0
    for offset, length in extents:
        if offset < at or length < 0:
            raise LayerError("its map is not in order")
        at = offset + length
        total += length
    if len(numbers) % 2 or at > size or total != stored:
        raise LayerError(f"its map does not fit its {size} bytes, of which {stored} are in the layer")
    return extents
