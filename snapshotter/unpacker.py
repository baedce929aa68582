"""Makes the files of one layer in an empty directory, as overlayfs wants to find them.

Runs as root in the unpack worker and trusts nothing in the layer. The kernel resolves every path as it would for a
process with the layer for its root (openat2 with RESOLVE_IN_ROOT), so that symbolic links lead nowhere else; one
component is then made, replaced or linked relative to that descriptor. A name with ``..`` out of the layer is refused.
Whiteouts follow the OCI image specification, "Representing Changes".
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from snapshotter import implied, marks, removal, tar
from snapshotter.errors import LayerError, LimitError, SnapshotError, shown
from snapshotter.mounts import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
RESERVED = b".wh..wh."
ACCESS_LIST = b"system.posix_acl_access"
_DEFAULT_LIST = b"system.posix_acl_default"

_INSIDE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_ACCOUNTED = 4096
_IMPLICIT_MODE = 0o755
_MAX_PATH = 4095
_MAX_IMPLIED = 16 << 20  # bytes of the names of directories that have no entry
_MAX_LINKS = 40  # on one path, as in the kernel

_REASONS = {
    errno.ELOOP: "passes through too many symbolic links",
    errno.ENOTDIR: "has a parent that is not a directory",
    errno.ENAMETOOLONG: "has a name that is too long for the file system",
}
# What no layer can bring about by its content: the node's trouble.
_HOST_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP}
)


class Unpacked(NamedTuple):
    """What was made; see snapshotter.model.Layer."""

    size: int
    inodes: int
    opaque: bool


def unpack(
    reader: tar.TarReader, root: int, area: int, set_opaque: Callable[[int], None] = marks.set_opaque
) -> Unpacked:
    """Make the entries of ``reader`` in the directory ``root``; ``area`` takes what is to be deleted on the way.

    Both are descriptors of directories on one mount, ``area`` outside of ``root``. ``set_opaque`` marks a directory
    as overlayfs has it. Raises LayerError where the content is at fault and SnapshotError where the node is; what was
    made by then stays.
    """
    unpacker = _Unpacker(reader, root, area, set_opaque)
    for entry in reader:
        try:
            unpacker.make(entry)
        except (OSError, LayerError) as e:
            raise _told_of(entry, e) from e
    unpacker.finish()
    return Unpacked(unpacker.size, unpacker.inodes, unpacker.opaque)


def _told_of(entry: tar.Entry, error: OSError | LayerError) -> SnapshotError:
    """The error, with the entry's name before it."""
    what = f"{entry.kind} {shown(entry.name)}"
    if isinstance(error, LayerError):
        return type(error)(f"{what}: {error}")
    if error.errno in _HOST_ERRORS:
        return SnapshotError(f"cannot make {what}: {error.strerror}")
    return LayerError(f"{what}: {_REASONS.get(error.errno or 0, error.strerror)}")


class _Unpacker:
    def __init__(self, reader: tar.TarReader, root: int, area: int, set_opaque: Callable[[int], None]) -> None:
        self._reader = reader
        self._root = root
        self._area = area
        self._set_opaque = set_opaque
        self.size = 0
        self.inodes = 0
        self.opaque = False
        # The directory of the entry before, which is mostly the directory of the next one, too.
        self._parent: bytes | None = None
        self._parent_fd = -1
        self._root_owned = False
        self._times: dict[bytes, int] = {}
        # Directories without an entry of their own, by inode.
        self._implied = {os.fstat(root).st_ino: b""}
        self._implied_bytes = 0
        self._default_lists: dict[bytes, bytes] = {}
        self._makers = {
            tar.FILE: self._file,
            tar.DIRECTORY: self._directory,
            tar.SYMLINK: self._symlink,
            tar.LINK: self._link,
            tar.FIFO: self._fifo,
            tar.CHARACTER: self._device,
            tar.BLOCK_DEVICE: self._device,
        }

    def make(self, entry: tar.Entry) -> None:
        """Make one entry, replacing what an earlier one left under its name."""
        parent, _, base = entry.name.rpartition(b"/")
        if base in (b"", b".", b".."):
            parent, base = _split(entry.name)
            if not base:
                self._change_root(entry)
                return
        if WHITEOUT in entry.name and self._is_mark(entry.name, parent, base):
            return
        maker = self._makers[entry.kind]
        fd = self._open_parent(parent)
        try:
            maker(fd, base, entry)
        except FileExistsError:
            self._clear(fd, base)
            maker(fd, base, entry)

    def finish(self) -> None:
        """Set what directories would have given to what is made in them, and their times, which that would change."""
        for name, value in self._default_lists.items():
            try:
                fd = openat2(self._root, b"/".join(_parts(name)) or b".", _DIRECTORY, _INSIDE)
            except OSError:
                continue  # a later entry replaced it
            self._set_access_list(fd, _DEFAULT_LIST, value)
            os.close(fd)
        if self._implied:
            implied.write(self._area, self._implied.values())
        for name, mtime in self._times.items():
            try:
                fd = openat2(self._root, b"/".join(_parts(name)) or b".", _DIRECTORY, _INSIDE)
            except OSError:
                continue  # a later entry replaced it
            os.utime(fd, ns=(mtime, mtime))
            os.close(fd)

    def _file(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        file = os.open(base, _NEW_FILE, entry.mode & 0o777, dir_fd=fd)
        try:
            if entry.extents is None:
                for piece in self._reader.content():
                    written = os.write(file, piece)
                    while written < len(piece):
                        written += os.write(file, piece[written:])
            else:
                self._fill(file, entry.size, entry.extents)
            self._set_attributes(file, entry, fresh=True)
            os.utime(file, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(file)
        self._account(entry.size if entry.extents is None else sum(length for _, length in entry.extents))

    def _fill(self, file: int, size: int, extents: tuple[tuple[int, int], ...]) -> None:
        """Write a sparse file: its content into its ``extents``, and holes between them."""
        places = iter(extents)
        at = left = 0
        for piece in self._reader.content():
            while piece:
                while not left:
                    at, left = next(places)
                written = os.pwrite(file, piece[:left], at)
                at, left, piece = at + written, left - written, piece[written:]
        os.ftruncate(file, size)

    def _directory(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        fresh = self._make_directory(fd, base, entry.mode & 0o777)
        if not fresh or entry.mode & 0o7000 or entry.uid or entry.gid or entry.xattrs or not self._root_owned:
            directory = os.open(base, _DIRECTORY, dir_fd=fd)
            try:
                self._set_attributes(directory, entry, fresh=False)
                if not fresh:
                    self._implied.pop(os.fstat(directory).st_ino, None)
            finally:
                os.close(directory)
        self._times[entry.name] = entry.mtime

    def _symlink(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        if not entry.link:
            raise LayerError("has no target")
        os.symlink(entry.link, base, dir_fd=fd)
        self._finish_special(fd, base, entry)

    def _fifo(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        os.mkfifo(base, entry.mode & 0o777, dir_fd=fd)
        self._finish_special(fd, base, entry)

    def _device(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        """Make a device node, or leave it out where the node's user namespace may not: containerd does so, too.

        Nobody here opens it, and the device cgroup says who may in a container. 0:0 is overlayfs's whiteout.
        """
        kind = stat.S_IFBLK if entry.kind is tar.BLOCK_DEVICE else stat.S_IFCHR
        try:
            os.mknod(base, kind | entry.mode & 0o777, entry.device, dir_fd=fd)
        except PermissionError:
            return
        self._finish_special(fd, base, entry)

    def _link(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        parent, target = _split(entry.link)
        if not target:
            raise LayerError("has the layer's root as its target")
        try:
            source = fd if parent == self._parent else self._open_directory(_parts(parent), make=False)
        except OSError as e:
            raise LayerError(f"has a target {shown(entry.link)} that cannot be reached: {e.strerror}") from e
        try:
            status = _status(source, target)
            if status is None or _is_whiteout(status):
                raise LayerError(f"has a target {shown(entry.link)} that is not in the layer")
            if stat.S_ISDIR(status.st_mode):
                raise LayerError(f"has a directory, {shown(entry.link)}, as its target")
            os.link(target, base, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            if source != fd:
                os.close(source)

    def _is_mark(self, name: bytes, parent: bytes, base: bytes) -> bool:
        """Whether the entry is a whiteout, which is then made, or something of AUFS's own, which is left out."""
        if base == OPAQUE_MARK:
            fd = self._open_parent(parent)
            self._set_opaque(fd)
            if os.path.sameopenfile(fd, self._root):
                self.opaque = True
            return True
        parts = _parts(name)
        if any(part.startswith(RESERVED) for part in parts):
            return True
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            raise LayerError("has a whiteout among its parents")
        if not base.startswith(WHITEOUT):
            return False
        hidden = base.removeprefix(WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise LayerError("is a whiteout that names no file")
        fd = self._open_parent(parent)
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=fd)
            self._account(0)
        except FileExistsError:
            # A whiteout is about the layers below. A file of this layer hides them by itself.
            status = _status(fd, hidden)
            if status is not None and stat.S_ISDIR(status.st_mode):
                self._make_opaque(fd, hidden)
        return True

    def _change_root(self, entry: tar.Entry) -> None:
        if entry.kind is not tar.DIRECTORY:
            raise LayerError("stands for the layer's root and is no directory")
        self._set_attributes(self._root, entry, fresh=False)
        self._implied.pop(os.fstat(self._root).st_ino, None)
        self._times[b"."] = entry.mtime
        self._parent = None

    def _set_attributes(self, fd: int, entry: tar.Entry, *, fresh: bool) -> None:
        """Owner, then mode, then extended attributes: each clears what may come after it.

        A ``fresh`` file has its permission bits from its creation, and its owner where that is root.
        """
        if not fresh or entry.uid or entry.gid or not self._root_owned:
            os.chown(fd, entry.uid, entry.gid)
        if not fresh or entry.mode & 0o7000:
            os.chmod(fd, entry.mode)
        for name, value in entry.xattrs.items():
            if name.startswith(b"trusted.overlay."):
                raise LayerError(f"has the attribute {shown(name)}, which is overlayfs's own")
            # Others are the building host's own (security.selinux, security.ima). An access list is kept: without it,
            # the mode's group bits would give the group what they only bound.
            if is_kept(name):
                os.setxattr(fd, name, value)
            elif name == ACCESS_LIST:
                self._set_access_list(fd, name, value)
            elif name == _DEFAULT_LIST:
                self._default_lists[entry.name] = value

    def _set_access_list(self, fd: int, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(fd, name, value)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise

    def _finish_special(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        if entry.uid or entry.gid or not self._root_owned:
            os.chown(base, entry.uid, entry.gid, dir_fd=fd, follow_symlinks=False)
        if entry.mode & 0o7000 and entry.kind is not tar.SYMLINK:
            os.chmod(base, entry.mode, dir_fd=fd)
        os.utime(base, ns=(entry.mtime, entry.mtime), dir_fd=fd, follow_symlinks=False)
        self._account(0)

    def _account(self, size: int) -> None:
        self.inodes += 1
        self.size += -(-size // _ACCOUNTED) * _ACCOUNTED

    def _make_directory(self, fd: int, base: bytes, mode: int) -> bool:
        """Make a directory or keep the one that is there; say whether it is new and as ``mode`` says.

        One that takes the place of a whiteout is opaque: the whiteout hid what lies below.
        """
        try:
            os.mkdir(base, mode, dir_fd=fd)
        except FileExistsError:
            status = _status(fd, base)
            if status is not None and stat.S_ISDIR(status.st_mode):
                return False
            self._clear(fd, base)
            os.mkdir(base, mode, dir_fd=fd)
            if status is not None and _is_whiteout(status):
                self._make_opaque(fd, base)
        self._account(_ACCOUNTED)
        return True

    def _make_opaque(self, fd: int, base: bytes) -> None:
        """Mark a directory that takes the place of what the layers below have there."""
        directory = os.open(base, _DIRECTORY, dir_fd=fd)
        try:
            self._set_opaque(directory)
            self._implied.pop(os.fstat(directory).st_ino, None)
        finally:
            os.close(directory)

    def _clear(self, fd: int, base: bytes) -> None:
        """Remove what an earlier entry left at ``base``, following nothing."""
        status = os.lstat(base, dir_fd=fd)
        if stat.S_ISDIR(status.st_mode):
            os.rename(base, b"replaced", src_dir_fd=fd, dst_dir_fd=self._area)
            removal.remove(self._area, "replaced")
        else:
            os.unlink(base, dir_fd=fd)
        # The directory kept open may have been reached through what is gone now.
        self._parent = None

    def _open_parent(self, path: bytes) -> int:
        """A descriptor of the directory ``path``, made where it is missing; it lasts until the next call."""
        if path == self._parent:
            return self._parent_fd
        fd = self._open_directory(_parts(path), make=True)
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
        self._parent, self._parent_fd = path, fd
        status = os.fstat(fd)
        # A new inode takes its directory's group where that is setgid.
        self._root_owned = status.st_gid == 0 and not status.st_mode & stat.S_ISGID
        return fd

    def _open_directory(self, parts: list[bytes], *, make: bool) -> int:
        try:
            return openat2(self._root, b"/".join(parts) or b".", os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        except (FileNotFoundError, NotADirectoryError):
            if not make:
                raise
        fd = os.dup(self._root)
        done: list[bytes] = []  # without symbolic links
        todo = parts[::-1]
        links = 0
        try:
            while todo:
                part = todo.pop()
                target = _link_target(fd, part)
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
                above = openat2(self._root, b"/".join(done) or b".", _DIRECTORY, _INSIDE)
                os.close(fd)
                fd = above
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _enter(self, fd: int, part: bytes, parents: list[bytes]) -> int:
        """Open ``part`` in ``fd``, which is ``parents``; make it a directory where there is nothing or a whiteout."""
        status = _status(fd, part)
        if status is None or _is_whiteout(status):
            self._make_directory(fd, part, _IMPLICIT_MODE)
            directory = os.open(part, _DIRECTORY, dir_fd=fd)
            os.chown(directory, 0, 0)
            if status is None:
                self._imply(directory, b"/".join([*parents, part]))
            return directory
        return os.open(part, _DIRECTORY, dir_fd=fd)

    def _imply(self, directory: int, name: bytes) -> None:
        """Note that a directory has no entry so far: it is to be as it is in the layers below.

        One deeper than a path may be long is left as it is: by what is written down nobody could find it.
        """
        if len(name) > _MAX_PATH:
            return
        self._implied[os.fstat(directory).st_ino] = name
        self._implied_bytes += len(name)
        if self._implied_bytes > _MAX_IMPLIED:
            raise LimitError(f"the directories without an entry have names of more than {_MAX_IMPLIED} bytes")


def _link_target(fd: int, base: bytes) -> bytes | None:
    """What the symbolic link ``base`` says; None where it is none."""
    try:
        return os.readlink(base, dir_fd=fd)
    except OSError:
        return None


def is_kept(name: bytes) -> bool:
    """Whether an extended attribute is the layer's to set as it is; access lists are another matter."""
    return name.startswith(b"user.") or name == b"security.capability"


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _status(fd: int, base: bytes) -> os.stat_result | None:
    try:
        return os.lstat(base, dir_fd=fd)
    except FileNotFoundError:
        return None


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Parent and last component of a path, normalised; both empty for the root."""
    parts = _parts(path)
    return (b"/".join(parts[:-1]), parts[-1]) if parts else (b"", b"")


def _parts(path: bytes) -> list[bytes]:
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
