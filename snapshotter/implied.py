"""Directories that a layer names only by what is in them.

Such a directory is as it is in the layer below: the layer changes its content and nothing of itself. But a layer is
unpacked without those below it, and overlayfs takes a directory from the topmost layer that has it. So the unpacker
writes down which ones it has made up, and they are settled before the layer is first mounted, when all are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from snapshotter.marks import OPAQUE_XATTR
from snapshotter.mounts import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

FILE = "implied"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT = ("user.", "system.posix_acl_")


def write(area: int, names: Iterable[bytes]) -> None:
    """Write down directories of the layer in ``area``, by paths below its root, b"" for the root itself."""
    fd = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=area)
    with open(fd, "wb") as file:
        file.writelines(b"%s\0" % name for name in names)


def are_in(path: str) -> bool:
    """Whether the layer at ``path`` has any that are not settled."""
    return os.path.exists(os.path.join(path, FILE))


def settle(path: str, below: Sequence[str]) -> None:
    """Give those of the layer at ``path`` what they have in the layers ``below``, the nearest first.

    Those are settled, and nothing of all of them is mounted that was not before. Raises OSError.
    """
    with open(os.path.join(path, FILE), "rb") as file:
        names = file.read().split(b"\0")[:-1]
    with ExitStack() as stack:
        root, *lower = (_open(stack, os.path.join(layer, "fs")) for layer in (path, *below))
        for name in names:
            try:
                directory = openat2(root, name or b".", _DIRECTORY, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                source = _find(root, lower, name)
                if source is not None:
                    _copy(source, directory)
            finally:
                os.close(directory)
    os.unlink(os.path.join(path, FILE))


def _open(stack: ExitStack, path: str) -> int:
    fd = os.open(path, _DIRECTORY)
    stack.callback(os.close, fd)
    return fd


def _find(root: int, lower: Sequence[int], name: bytes) -> int | None:
    """A descriptor of what a directory stands on; None where there is nothing, or something else hides it."""
    parts = name.split(b"/") if name else []
    # Of the layer itself, what is above counts: an opaque directory hides what is in it, and is itself still there.
    fd, _, hides = _walk(root, parts[:-1])
    os.close(fd)
    for top in lower:
        if hides:
            return None
        fd, found, hides = _walk(top, parts)
        if found:
            return fd
        os.close(fd)
    return None


def _walk(top: int, parts: Sequence[bytes]) -> tuple[int, bool, bool]:
    """The directory at ``parts`` below ``top`` or the last one on the way; is it there, and are those below hidden."""
    fd = os.dup(top)
    hides = False
    for part in parts:
        try:
            inner = os.open(part, _DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            return fd, False, hides
        except OSError:
            return fd, False, True  # a whiteout, a file, a link
        os.close(fd)
        fd = inner
        hides = hides or _is_opaque(fd)
    return fd, True, hides


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE_XATTR) == b"y"
    except OSError:
        return False


def _copy(source: int, target: int) -> None:
    """Give a directory the owner, mode, attributes and time of another one, whose descriptor is closed."""
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
