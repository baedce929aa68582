"""The directories of a layer that is being unpacked: paths in it are resolved, and missing directories made.

The kernel resolves every path as it would for a process with the layer for its root (openat2 with RESOLVE_IN_ROOT), so
that symbolic links lead nowhere else. A name with ``..`` out of the layer is refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from snapshotter import removal
from snapshotter.errors import LayerError, LimitError, raise_lack
from snapshotter.files import link_target
from snapshotter.mounts import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_INSIDE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCOUNTED = 4096
_IMPLICIT_MODE = 0o755
_MAX_PATH = 4095
# Bytes for which a directory counts that no path reaches.
_UNREACHED = 16
_MAX_NOTED = 16 << 20  # bytes of the names of directories that are noted for snapshotter.settling
_MAX_LINKS = 40  # on one path, as in the kernel
_PSEUDO_LINKS = "pseudo-links"


class LayerRoot:
    """The root directory ``fd`` of a layer, and a count of what is made below it.

    ``area`` is a directory on the same mount, outside of the root; files that are to be deleted are moved there first.
    ``set_opaque`` marks a directory as opaque for overlayfs. ``parent`` is the path that :meth:`open_parent` was last
    called with, None where that descriptor must not be used again. ``root_owned`` says that a new inode in that
    directory belongs to user and group 0.
    """

    def __init__(self, fd: int, area: int, set_opaque: Callable[[int], None]) -> None:
        self.fd = fd
        self.set_opaque = set_opaque
        self.size = 0
        self.inodes = 0
        self.root_owned = False
        self._area = area
        # It is kept open: the next entry is mostly in the same directory.
        self.parent: bytes | None = None
        self._parent_fd = -1
        # Directories without an entry of their own: names by inode number.
        self._implied = {os.fstat(fd).st_ino: b""}
        self.with_whiteouts: set[bytes] = set()
        self.left_out: set[bytes] = set()  # names of extended attributes
        self._noted_bytes = 0
        self._has_pseudo_links = False

    def close(self) -> None:
        """Close what :meth:`open_parent` has left open."""
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
        self.parent, self._parent_fd = None, -1

    @property
    def implied(self) -> Collection[bytes]:
        """The names of the directories that have no entry of their own; see snapshotter.settling."""
        return self._implied.values()

    def has_entry(self, directory: int) -> None:
        """Note that a directory is not implied any more: it has an entry, or it is opaque."""
        self._implied.pop(os.fstat(directory).st_ino, None)

    def note_whiteout(self) -> None:
        """Note that a whiteout was made in the directory that :meth:`open_parent` has opened: it may hide nothing.

        The root is not noted: overlayfs merges it always with the root of the snapshot.
        """
        name = b"/".join(parts_of(self.parent or b""))
        if name and name not in self.with_whiteouts:
            self.with_whiteouts.add(name)
            self._count_noted(len(name))

    def leave_out(self, name: bytes) -> None:
        """Note that a file lacks its extended attribute ``name``, which the file system has no place for."""
        if name not in self.left_out:
            self.left_out.add(name)
            self._count_noted(len(name))

    def open_target(self, path: bytes) -> int:
        """A descriptor of the directory ``path``, which is there already; the caller closes it. Raises OSError."""
        return self._open_directory(parts_of(path), make=False)

    def hides(self, path: bytes) -> bool:
        """Whether the layer has something else than directories on the way to the directory ``path``.

        A file or a whiteout there hides already what the layers below have in that directory.
        """
        if path == self.parent:
            return False
        try:
            os.close(openat2(self.fd, b"/".join(parts_of(path)) or b".", _DIRECTORY & ~os.O_NOFOLLOW, _INSIDE))
        except NotADirectoryError:
            return True
        except OSError as e:
            raise_lack(e)
        return False

    def open_pseudo_links(self) -> int:
        """A descriptor of the directory of AUFS's pseudo-links, outside of the root; the caller closes it."""
        if not self._has_pseudo_links:
            os.mkdir(_PSEUDO_LINKS, 0o700, dir_fd=self._area)
            self._has_pseudo_links = True
        return os.open(_PSEUDO_LINKS, _DIRECTORY, dir_fd=self._area)

    def remove_pseudo_links(self) -> None:
        """Remove that directory, when the layer has all its hard links."""
        if self._has_pseudo_links:
            removal.remove(self._area, _PSEUDO_LINKS)
            self._has_pseudo_links = False

    @contextmanager
    def opened(self, path: bytes) -> Iterator[int | None]:
        """A descriptor of the directory ``path`` while the block lasts; None where a later entry has replaced it."""
        try:
            fd = openat2(self.fd, b"/".join(parts_of(path)) or b".", _DIRECTORY, _INSIDE)
        except OSError as e:
            raise_lack(e)
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def account(self, size: int) -> None:
        """Count one inode, and its ``size`` in bytes."""
        self.inodes += 1
        self.size += -(-size // _ACCOUNTED) * _ACCOUNTED

    def make_directory(self, fd: int, base: bytes, mode: int) -> bool:
        """Make a directory, or keep the one that is there. Returns whether it is new and has ``mode``.

        A directory that replaces a whiteout is made opaque, as the whiteout hides what the layers below have there.
        """
        try:
            os.mkdir(base, mode, dir_fd=fd)
        except FileExistsError:
            status = status_of(fd, base)
            if status is not None and stat.S_ISDIR(status.st_mode):
                return False
            self.clear(fd, base)
            os.mkdir(base, mode, dir_fd=fd)
            if status is not None and is_whiteout(status):
                self.make_opaque(fd, base)
        self.account(_ACCOUNTED)
        return True

    def make_opaque(self, fd: int, base: bytes) -> None:
        """Mark a directory as opaque: it replaces what the layers below have there."""
        directory = os.open(base, _DIRECTORY, dir_fd=fd)
        try:
            self.set_opaque(directory)
            self.has_entry(directory)
        finally:
            os.close(directory)

    def clear(self, fd: int, base: bytes) -> None:
        """Remove what an earlier entry has made at ``base``; links are not followed."""
        status = os.lstat(base, dir_fd=fd)
        if stat.S_ISDIR(status.st_mode):
            os.rename(base, b"replaced", src_dir_fd=fd, dst_dir_fd=self._area)
            removal.remove(self._area, "replaced")
        else:
            os.unlink(base, dir_fd=fd)
        # The way to the directory that is kept open may have led through the removed one.
        self.parent = None

    def open_parent(self, path: bytes) -> int:
        """A descriptor of the directory ``path``, which is made if it is missing. It is open until the next call."""
        if path == self.parent:
            return self._parent_fd
        fd = self._open_directory(parts_of(path), make=True)
        self.close()
        self.parent, self._parent_fd = path, fd
        status = os.fstat(fd)
        # In a setgid directory a new inode takes over the directory's group.
        self.root_owned = status.st_gid == 0 and not status.st_mode & stat.S_ISGID
        return fd

    def _open_directory(self, parts: list[bytes], *, make: bool) -> int:
        try:
            return openat2(self.fd, b"/".join(parts) or b".", os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        except (FileNotFoundError, NotADirectoryError):
            if not make:
                raise
        fd = os.dup(self.fd)
        done: list[bytes] = []  # the resolved path of fd, without symbolic links
        todo = parts[::-1]
        links = 0
        try:
            while todo:
                part = todo.pop()
                target = link_target(part, fd)
                if target is not None:
                    links += 1
                    if links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))  # noqa: TRY301 - closes fd
                    todo += reversed([piece for piece in target.split(b"/") if piece not in (b"", b".")])
                    done = [] if target.startswith(b"/") else done
                elif part == b"..":
                    del done[-1:]
                else:
                    below = self._enter(fd, part, done)
                    os.close(fd)
                    fd = below
                    done.append(part)
                    continue
                above = openat2(self.fd, b"/".join(done) or b".", _DIRECTORY, _INSIDE)
                os.close(fd)
                fd = above
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _enter(self, fd: int, part: bytes, parents: list[bytes]) -> int:
        """Open the directory ``part`` in ``fd``, whose path is ``parents``.

        It is made if there is nothing, or a whiteout.
        """
        status = status_of(fd, part)
        if status is None or is_whiteout(status):
            self.make_directory(fd, part, _IMPLICIT_MODE)
            directory = os.open(part, _DIRECTORY, dir_fd=fd)
            try:
                os.chown(directory, 0, 0)
                if status is None:
                    self._imply(directory, b"/".join([*parents, part]))
            except BaseException:
                os.close(directory)
                raise
            return directory
        return os.open(part, _DIRECTORY, dir_fd=fd)

    def _imply(self, directory: int, name: bytes) -> None:
        """Note that a directory has no entry so far: it will get its attributes from the layers below.

        A name that is longer than a path may be is not noted, as no system call could find the directory by it. It is
        counted, as one entry may make thousands of such directories.
        """
        if len(name) > _MAX_PATH:
            self._count_noted(_UNREACHED)
            return
        self._implied[os.fstat(directory).st_ino] = name
        self._count_noted(len(name))

    def _count_noted(self, size: int) -> None:
        self._noted_bytes += size
        if self._noted_bytes > _MAX_NOTED:
            raise LimitError(
                f"directories with whiteouts or without an entry, and attributes that are left out, have names of more "
                f"than {_MAX_NOTED} bytes"
            )


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a file is a whiteout as overlayfs has it: a character device with the number 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def status_of(fd: int, base: bytes) -> os.stat_result | None:
    """The status of ``base`` in the directory ``fd``, links not followed; None if there is nothing."""
    try:
        return os.lstat(base, dir_fd=fd)
    except FileNotFoundError:
        return None


def split(path: bytes) -> tuple[bytes, bytes]:
    """Parent and last component of a path, normalised; both empty for the root."""
    parts = parts_of(path)
    return (b"/".join(parts[:-1]), parts[-1]) if parts else (b"", b"")


def parts_of(path: bytes) -> list[bytes]:
    """The components of a path below the root. A leading slash means the root; ``..`` out of it is refused."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                raise LayerError("leads out of the layer")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return parts
