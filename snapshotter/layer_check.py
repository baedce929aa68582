"""The program that compares a layer on disk with the blob that it came from, and ends.

Its directory is the layer's, and its standard input is the blob. It prints one JSON object: ``differences`` by name,
``unread`` with the reason if the blob cannot be read, or ``lack`` with an error number if the node lacks something.
It changes nothing, and runs at the lowest priority.

1. Compared are: that every entry is there and nothing else is, kinds, contents, targets of links, modes, owners, users'
   extended attributes, capabilities and whiteouts.
2. Not compared are: times, access lists, and overlayfs's other marks.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import stat
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from snapshotter import allocator, confine, errors, file_tree, settling, tar
from snapshotter.layer_stream import LayerStream, decoder
from snapshotter.limits import LayerLimits
from snapshotter.mounts import RESOLVE_IN_ROOT, openat2
from snapshotter.unpacker import ACCESS_LIST, OPAQUE_MARK, PSEUDO_LINKS, RESERVED, WHITEOUT, is_kept

_MOST = 5  # differences that are named
_PIECE = 1 << 20
_NICEST = 19
_FORMATS = {
    tar.FILE: stat.S_IFREG,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.SYMLINK: stat.S_IFLNK,
    tar.FIFO: stat.S_IFIFO,
    tar.CHARACTER: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
}

_DAC_READ_SEARCH = 1 << 2


class _Wanted(NamedTuple):
    """What the file of an entry must be; ``order`` is the entry's position in the archive."""

    order: int
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    link: bytes
    digest: bytes
    extents: tuple[tuple[int, int], ...] | None
    device: int
    xattrs: dict[bytes, bytes]


def main() -> None:
    """Compare as the first argument, a JSON object, says."""
    options = json.loads(sys.argv[1])
    os.nice(_NICEST)
    allocator.keep_memory()
    limits = LayerLimits(**options["limits"])
    result: dict[str, Any]
    try:
        decode = decoder(sys.stdin.buffer, options["compression"])
        dropped = frozenset(_names_in(settling.DROPPED))
        left_out = frozenset(settling.left_out_of("."))
        _confine(options["daemon"])
        root = os.open("fs", os.O_RDONLY | os.O_DIRECTORY)
        stream = LayerStream(sys.stdin.buffer, decode, limits)
        reader = tar.TarReader(stream.read, limits)
        layer = _Layer(reader, left_out)
        reader.drain()
        if stream.digest() != options["diff_id"]:
            result = {"unread": f"its content is {stream.digest()}"}
        else:
            result = {"differences": list(_differences(root, layer, dropped))}
    except errors.SnapshotError as e:
        result = {"unread": str(e)}
    except OSError as e:
        result = {"lack": e.errno} if errors.is_lack(e) else {"differences": [f"it cannot be read: {e.strerror}"]}
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()


class _Layer:
    """All entries of a layer: what must be at each path after the last entry.

    ``hidden`` has the paths of whiteouts, ``opaque`` those of opaque directories, with their positions in the archive.
    """

    def __init__(self, reader: tar.TarReader, left_out: Collection[bytes]) -> None:
        self._left_out = left_out  # names of extended attributes
        self.wanted: dict[bytes, _Wanted] = {}
        self._pseudo_links: dict[bytes, _Wanted] = {}  # by path
        self.hidden: dict[bytes, int] = {}
        self.opaque: dict[bytes, int] = {}
        for order, entry in enumerate(reader):
            path = _path(entry.name)
            parent, _, base = path.rpartition(b"/")
            if base == OPAQUE_MARK:
                self.opaque[parent] = order
            elif any(part.startswith(RESERVED) for part in path.split(b"/")):
                if entry.kind == tar.FILE and parent == PSEUDO_LINKS:
                    self._pseudo_links[path] = self._described(order, entry, reader)
            elif base.startswith(WHITEOUT):
                self.hidden[path[: len(path) - len(base)] + base.removeprefix(WHITEOUT)] = order
            else:
                self._add(path, order, entry, reader)

    def _add(self, path: bytes, order: int, entry: tar.Entry, reader: tar.TarReader) -> None:
        # A hard link is compared with its target's entry as it is now: a later entry may replace the target.
        if not path and entry.kind == tar.LINK:
            return  # the root as a hard link to itself
        if entry.kind == tar.LINK:
            link = _path(entry.link)
            target = self.wanted.get(link) or self._pseudo_links.get(link)
            if target is not None:
                self.wanted[path] = target._replace(order=order)
                return
        self.wanted[path] = self._described(order, entry, reader)

    def _described(self, order: int, entry: tar.Entry, reader: tar.TarReader) -> _Wanted:
        digest = hashlib.sha256()
        for piece in reader.content():
            digest.update(piece)
        return _Wanted(
            order,
            entry.kind,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.size,
            entry.link,
            digest.digest(),
            entry.extents,
            entry.device,
            {name: value for name, value in entry.xattrs.items() if name not in self._left_out},
        )

    def alive(self) -> dict[bytes, _Wanted]:
        """What must be on disk, in the order of the archive."""
        found = [(path, entry) for path, entry in self.wanted.items() if not self.replaced(path, entry.order)]
        return dict(sorted(found, key=lambda item: item[1].order))

    def replaced(self, path: bytes, order: int) -> bool:
        """Whether a later entry than ``order`` has replaced a directory above ``path`` by something else."""
        parent = path.rpartition(b"/")[0]
        while parent:
            other = self.wanted.get(parent)
            if other is not None and other.kind != tar.DIRECTORY and other.order > order:
                return True
            parent = parent.rpartition(b"/")[0]
        return False


def _names_in(path: str) -> list[bytes]:
    try:
        return settling.read(path)
    except FileNotFoundError:
        return []


def _differences(root: int, layer: _Layer, dropped: Collection[bytes]) -> Iterator[str]:
    """Up to ``_MOST`` differences in words, and how many more there are."""
    count = 0
    for difference in _all_differences(root, layer, dropped):
        count += 1
        if count <= _MOST:
            yield difference
    if count > _MOST:
        yield f"{count - _MOST} more"


def _all_differences(root: int, layer: _Layer, dropped: Collection[bytes]) -> Iterator[str]:
    """All differences in words; ``dropped`` are the directories whose whiteouts were deleted as they hide nothing."""
    alive = layer.alive()
    places = _Places(root)
    # By directory and name: several paths may lead to one place, and then the last entry counts.
    last = {places.of(path): path for path in alive if path}
    hidden = [(path, order) for path, order in layer.hidden.items() if path.rpartition(b"/")[0] not in dropped]
    for path, order in [*hidden, *layer.opaque.items()]:
        if path and places.of(path) not in last and _status(root, path) is None and not layer.replaced(path, order):
            if _is_below_no_directory(root, path):
                continue  # a file or a whiteout hides more than this one
            yield f"{errors.shown(path)} is missing"
    for path in last.values():
        if what := _difference(root, path, alive[path]):
            yield f"{errors.shown(path)} {what}"
    if b"" in alive and (what := _attributes(os.fstat(root), alive[b""])):
        yield f"the root {what}"
    known = {*last, *map(places.of, layer.hidden), *(places.of(path) for path in layer.opaque if path)}
    yield from places.others(known)


def _difference(root: int, path: bytes, wanted: _Wanted) -> str:
    """How the file at ``path`` differs from what it must be; "" where it does not."""
    status = _status(root, path)
    if status is None:
        # The unpacker leaves devices out where it may not make them.
        return "" if wanted.kind in (tar.CHARACTER, tar.BLOCK_DEVICE) else "is missing"
    expected = _FORMATS.get(wanted.kind)
    if expected is None:
        return ""  # a hard link whose target's entry is not known, as its path leads through symbolic links
    if stat.S_IFMT(status.st_mode) != expected:
        return f"is no {wanted.kind}"
    if expected in (stat.S_IFCHR, stat.S_IFBLK) and status.st_rdev != wanted.device:
        return "is another device"
    if expected == stat.S_IFREG:
        if status.st_size != wanted.size:
            return f"has {status.st_size} bytes in place of {wanted.size}"
        if not _has_content(root, path, wanted):
            return "has another content"
    if expected == stat.S_IFLNK and _target(root, path) != wanted.link:
        return "leads elsewhere"
    return _attributes(status, wanted) or _xattrs(root, path, wanted)


def _attributes(status: os.stat_result, wanted: _Wanted) -> str:
    if (status.st_uid, status.st_gid) != (wanted.uid, wanted.gid):
        return f"belongs to {status.st_uid}:{status.st_gid} in place of {wanted.uid}:{wanted.gid}"
    mode = stat.S_IMODE(status.st_mode)
    # An access list changes the mode's group bits.
    if wanted.kind != tar.SYMLINK and ACCESS_LIST not in wanted.xattrs and mode != wanted.mode & 0o7777:
        return f"has the mode {mode:o} in place of {wanted.mode & 0o7777:o}"
    return ""


def _xattrs(root: int, path: bytes, wanted: _Wanted) -> str:
    if not wanted.xattrs or wanted.kind not in (tar.FILE, tar.DIRECTORY):
        return ""
    fd = openat2(root, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, RESOLVE_IN_ROOT)
    try:
        for name, value in wanted.xattrs.items():
            if is_kept(name):
                try:
                    found = os.getxattr(fd, name)
                except OSError as e:
                    errors.raise_lack(e)
                    return f"has lost its attribute {errors.shown(name)}"
                if found != value:
                    return f"has another {errors.shown(name)}"
    finally:
        os.close(fd)
    return ""


def _has_content(root: int, path: bytes, wanted: _Wanted) -> bool:
    digest = hashlib.sha256()
    fd = openat2(root, path, os.O_RDONLY | os.O_NOFOLLOW, RESOLVE_IN_ROOT)
    try:
        # Read from the disk, not from the page cache.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for at, length in wanted.extents if wanted.extents is not None else ((0, wanted.size),):
            end = at + length
            while at < end and (piece := os.pread(fd, min(_PIECE, end - at), at)):
                digest.update(piece)
                at += len(piece)
    except OSError as e:
        errors.raise_lack(e)
        return False
    finally:
        os.close(fd)
    return digest.digest() == wanted.digest


def _target(root: int, path: bytes) -> bytes:
    fd = openat2(root, path, os.O_PATH | os.O_NOFOLLOW, RESOLVE_IN_ROOT)
    try:
        return os.readlink(b"", dir_fd=fd)
    finally:
        os.close(fd)


def _status(root: int, path: bytes) -> os.stat_result | None:
    try:
        fd = openat2(root, path, os.O_PATH | os.O_NOFOLLOW, RESOLVE_IN_ROOT)
    except OSError as e:
        errors.raise_lack(e)
        return None
    status = os.fstat(fd)
    os.close(fd)
    return status


def _is_below_no_directory(root: int, path: bytes) -> bool:
    """Whether what is there of the way to ``path`` ends with something else than a directory."""
    try:
        os.close(openat2(root, path.rpartition(b"/")[0] or b".", os.O_PATH | os.O_DIRECTORY, RESOLVE_IN_ROOT))
    except NotADirectoryError:
        return True
    except OSError as e:
        errors.raise_lack(e)
    return False


class _Places:
    """The targets of paths below ``root``, through the layer's links: inode number of the directory, and name."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._numbers: dict[bytes, int] = {b"": os.fstat(root).st_ino}

    def of(self, path: bytes) -> tuple[int, bytes]:
        """The inode number of a path's directory, and the name in it. A missing directory has a negative number."""
        parent, _, base = path.rpartition(b"/")
        return self._number(parent), base

    def others(self, known: set[tuple[int, bytes]]) -> Iterator[str]:
        """Differences for all that is there and not ``known``, except for implied directories."""
        implied = set(self._numbers.values())
        foreign: set[int] = set()  # directories that are not of the layer: what is in them is not named too
        for place, entry in file_tree.walk(self._root):
            is_directory = entry.is_dir(follow_symlinks=False)
            is_known = (place.number, os.fsencode(entry.name)) in known or (is_directory and entry.inode() in implied)
            if place.number not in foreign:
                if is_known:
                    continue
                yield f"{errors.shown(os.fsencode(place.path_of(entry.name)))} is not of the layer"
            if is_directory:
                foreign.add(entry.inode())

    def _number(self, path: bytes) -> int:
        number = self._numbers.get(path)
        if number is None:
            self._number(path.rpartition(b"/")[0])
            number = -len(self._numbers)
            try:
                fd = openat2(self._root, path, os.O_PATH | os.O_DIRECTORY, RESOLVE_IN_ROOT)
            except OSError as e:
                errors.raise_lack(e)
            else:
                number = os.fstat(fd).st_ino
                os.close(fd)
            self._numbers[path] = number
        return number


def _path(name: bytes) -> bytes:
    """A path below the root, normalised; b"" for the root."""
    return posixpath.normpath(b"/" + name).lstrip(b"/")


def _confine(daemon: int) -> None:
    """Enter the layer by chroot, keep the one capability that reading takes, and end when the daemon does."""
    os.chroot(".")
    os.chdir("/")
    confine.keep_capabilities(_DAC_READ_SEARCH)
    confine.die_with(daemon)
