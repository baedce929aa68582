"""The work in a layer that waits for the layers below it, as a layer is unpacked without them.

1. Implied directories: a layer has entries in them, and no entry for the directory itself. Their owner, mode and
   attributes are those in the layer below, and overlayfs takes these from the topmost layer that has the directory. So
   the unpacker makes the directory with default attributes, and writes its name into the file ``implied``.
2. Whiteouts that hide nothing. Overlayfs leaves whiteouts out of a directory that several layers have. In a directory
   of one layer they would be names that a container sees and cannot open. So the unpacker writes the names of the
   directories with whiteouts into the file ``whiteouts``.

:func:`settle` does both before the layer is first mounted, when all layers are there. It notes in the file ``dropped``
which directories have lost their whiteouts, for snapshotter.layer_check.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from snapshotter.marks import OPAQUE_XATTR
from snapshotter.mounts import RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

IMPLIED = "implied"
WHITEOUTS = "whiteouts"
DROPPED = "dropped"
LEFT_OUT = "left-out"  # the unpacker's list of extended attributes that the file system has no place for
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
_NO_ATTRIBUTE = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT = ("user.", "system.posix_acl_")


def write(area: int, file_name: str, names: Iterable[bytes]) -> None:
    """Write a list of the layer in ``area``: paths below its root, b"" for the root itself."""
    fd = os.open(file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=area)
    with open(fd, "wb") as file:
        file.writelines(b"%s\0" % name for name in names)


def read(path: str) -> list[bytes]:
    """The names in the list ``path``. Raises OSError."""
    with open(path, "rb") as file:
        return file.read().split(b"\0")[:-1]


def left_out_of(path: str) -> list[bytes]:
    """The names of extended attributes that files of the layer at ``path`` lack. Raises OSError."""
    try:
        return read(os.path.join(path, LEFT_OUT))
    except FileNotFoundError:
        return []


def is_needed(path: str) -> bool:
    """Whether the layer at ``path`` is not settled."""
    return any(os.path.exists(os.path.join(path, name)) for name in (IMPLIED, WHITEOUTS))


def settle(path: str, below: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
    """Settle the layer at ``path``; ``below`` are the layers below it, nearest first.

    The layers below are settled already. The layer at ``path`` has never been mounted. ``check`` is called for each
    name, and may raise an error to end this early: another call then begins the list of names again. Raises OSError.
    """
    with ExitStack() as stack:
        root, *lower = (_open(stack, os.path.join(layer, "fs")) for layer in (path, *below))
        if os.path.exists(os.path.join(path, WHITEOUTS)):
            _drop_whiteouts(path, root, lower, check)
        if os.path.exists(os.path.join(path, IMPLIED)):
            _settle_implied(path, root, lower, check)


def _settle_implied(path: str, root: int, lower: Sequence[int], check: Callable[[], None]) -> None:
    """Give the implied directories their attributes from the layers below."""
    for name in read(os.path.join(path, IMPLIED)):
        check()
        try:
            directory = openat2(root, name or b".", _DIRECTORY, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
        except OSError as e:
            if e.errno not in _GONE:
                raise
            continue  # a later entry has replaced it, or a directory above it
        try:
            parts = name.split(b"/") if name else []
            # Of the layer itself the parents count: an opaque parent hides all that the lower layers have in it.
            source = _find(lower, parts, hidden=_hides(root, parts[:-1]))
            if source is not None:
                _copy(source, directory)
        finally:
            os.close(directory)
    os.unlink(os.path.join(path, IMPLIED))


def _drop_whiteouts(path: str, root: int, lower: Sequence[int], check: Callable[[], None]) -> None:
    """Delete the whiteouts in directories that no layer below has too."""
    dropped = set()
    for name in read(os.path.join(path, WHITEOUTS)):
        check()
        if _drop_in(name, root, lower):
            dropped.add(name)
    if dropped:
        list_path = os.path.join(path, DROPPED)
        with open(list_path + ".new", "wb") as file:
            file.writelines(b"%s\0" % name for name in dropped)
        os.rename(list_path + ".new", list_path)
    os.unlink(os.path.join(path, WHITEOUTS))


def _drop_in(name: bytes, root: int, lower: Sequence[int]) -> bool:
    """Delete the whiteouts in one directory, if no layer below has it. Returns whether that is so."""
    try:
        directory = openat2(root, name, _DIRECTORY & ~os.O_NOFOLLOW, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    except OSError as e:
        if e.errno not in _GONE:
            raise
        return False  # a later entry has replaced it
    try:
        parts = _real_parts(directory, root)
        source = _find(lower, parts, hidden=_hides(root, parts))
        if source is not None:
            os.close(source)
            return False
        _delete_whiteouts(directory)
    finally:
        os.close(directory)
    return True


def _delete_whiteouts(directory: int) -> None:
    before = os.fstat(directory)
    with os.scandir(directory) as entries:
        found = [entry.name for entry in entries if _is_whiteout(entry)]
    for base in found:
        os.unlink(base, dir_fd=directory)
    os.utime(directory, ns=(before.st_mtime_ns, before.st_mtime_ns))


def _is_whiteout(entry: os.DirEntry[str]) -> bool:
    status = entry.stat(follow_symlinks=False)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _real_parts(directory: int, root: int) -> list[bytes]:
    """The path of a directory below ``root``, without the symbolic links by which it was found."""
    real, above = (os.fsencode(os.readlink(f"/proc/self/fd/{fd}")) for fd in (directory, root))
    return [part for part in real.removeprefix(above).split(b"/") if part]


def _open(stack: ExitStack, path: str) -> int:
    fd = os.open(path, _DIRECTORY)
    stack.callback(os.close, fd)
    return fd


def _hides(root: int, parts: Sequence[bytes]) -> bool:
    """Whether the directory ``parts`` of a layer, or one above it, hides what the layers below have there."""
    fd, _, hides = _walk(root, parts)
    os.close(fd)
    return hides


def _find(lower: Sequence[int], parts: Sequence[bytes], *, hidden: bool) -> int | None:
    """A descriptor of the directory ``parts`` in the nearest layer below; None if there is none, or it is hidden."""
    for top in lower:
        if hidden:
            return None
        fd, found, hidden = _walk(top, parts)
        if found:
            return fd
        os.close(fd)
    return None


def _walk(top: int, parts: Sequence[bytes]) -> tuple[int, bool, bool]:
    """Walk to the directory ``parts`` below ``top``.

    Returns a descriptor of the last directory that is there, whether that is the whole path, and whether the lower
    layers are hidden. Raises OSError.
    """
    fd = os.dup(top)
    hides = False
    for part in parts:
        try:
            inner = os.open(part, _DIRECTORY, dir_fd=fd)
        except OSError as e:
            if e.errno not in _GONE:
                os.close(fd)
                raise  # this says nothing of the layer: the process may have no descriptors left
            # What is there and is no directory is a whiteout, a file or a link.
            return fd, False, hides or e.errno != errno.ENOENT
        os.close(fd)
        fd = inner
        try:
            hides = hides or _is_opaque(fd)
        except OSError:
            os.close(fd)
            raise
    return fd, True, hides


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE_XATTR) == b"y"
    except OSError as e:
        if e.errno not in _NO_ATTRIBUTE:
            raise
        return False


def _copy(source: int, target: int) -> None:
    """Copy the owner, mode, attributes and time of the directory ``source`` to ``target``; closes ``source``."""
    try:
        status = os.fstat(source)
        os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, status.st_mode & 0o7777)
        for name in os.listxattr(source):
            if name.startswith(_KEPT):
                os.setxattr(target, name, os.getxattr(source, name))
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
    finally:
        os.close(source)
