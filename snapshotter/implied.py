"""Implied directories: a layer has entries in them, and no entry for the directory itself.

The owner, mode and attributes of an implied directory are those in the layer below. But a layer is unpacked without the
layers below it, and overlayfs takes these attributes from the topmost layer that has the directory. So:

1. The unpacker makes the directory with default attributes, and writes its name into the file ``implied``.
2. Before the layer is first mounted, when all layers are there, :func:`settle` copies the attributes from below.
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
    """Write the implied directories of the layer in ``area``: paths below its root, b"" for the root itself."""
    fd = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=area)
    with open(fd, "wb") as file:
        file.writelines(b"%s\0" % name for name in names)


def are_in(path: str) -> bool:
    """Whether the layer at ``path`` has implied directories that are not settled."""
    return os.path.exists(os.path.join(path, FILE))


def settle(path: str, below: Sequence[str]) -> None:
    """Give the implied directories of the layer at ``path`` the attributes from the layers ``below``, nearest first.

    The layers below are settled already. The layer at ``path`` has never been mounted. Raises OSError.
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
    """A descriptor of the directory ``name`` in the nearest layer below; None if there is none, or it is hidden."""
    parts = name.split(b"/") if name else []
    # In the layer itself the parents count: an opaque parent hides all that the lower layers have in it.
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
    """Walk to the directory ``parts`` below ``top``.

    Returns a descriptor of the last directory that is there, whether that is the whole path, and whether the lower
    layers are hidden.
    """
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
