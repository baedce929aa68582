"""Makes the files of one layer in an empty directory, in the form that overlayfs needs.

It runs as root in the unpack worker and trusts nothing in the layer. snapshotter.layer_root opens the directory of an
entry. The entry's last component is then made, replaced or linked relative to that descriptor. Whiteouts follow the OCI
image specification, "Representing Changes".
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from typing import NamedTuple

from snapshotter import marks, settling, tar
from snapshotter.errors import LayerError, SnapshotError, raise_lack, shown
from snapshotter.layer_root import LayerRoot, is_whiteout, parts_of, split, status_of

WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
RESERVED = b".wh..wh."
# The directory of AUFS's pseudo-links. Docker 1.3 and earlier wrote layers with hard links to the files in it.
PSEUDO_LINKS = b".wh..wh.plnk"
ACCESS_LIST = b"system.posix_acl_access"
CAPABILITY = b"security.capability"
_DEFAULT_LIST = b"system.posix_acl_default"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_REASONS = {
    errno.ELOOP: "passes through too many symbolic links",
    errno.ENOTDIR: "has a parent that is not a directory",
    errno.ENAMETOOLONG: "has a name that is too long for the file system",
}
# Errors of setxattr(2) for an attribute that the file system cannot keep.
_NO_PLACE = frozenset({errno.EOPNOTSUPP, errno.E2BIG, errno.ERANGE})
# Errors that no content of a layer can cause: the node is at fault.
_HOST_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EAGAIN,
        errno.EDQUOT,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
    }
)


class Unpacked(NamedTuple):
    """The counts of what was made; see snapshotter.metadata.Layer."""

    size: int
    inodes: int
    opaque: bool


def unpack(
    reader: tar.TarReader, root: int, area: int, set_opaque: Callable[[int], None] = marks.set_opaque
) -> Unpacked:
    """Make the entries of ``reader`` in the directory ``root``. See LayerRoot for ``area`` and ``set_opaque``.

    ``root`` and ``area`` are descriptors of directories on one mount, ``area`` outside of ``root``. Raises LayerError
    if the content is at fault, and SnapshotError if the node is. What was made before the error stays.
    """
    with closing(LayerRoot(root, area, set_opaque)) as layer:
        unpacker = _Unpacker(reader, layer)
        for entry in reader:
            try:
                unpacker.make(entry)
            except (OSError, LayerError) as e:
                raise _told_of(entry, e) from e
        if layer.implied:
            settling.write(area, settling.IMPLIED, layer.implied)
        if layer.with_whiteouts:
            settling.write(area, settling.WHITEOUTS, sorted(layer.with_whiteouts))
        if layer.left_out:
            settling.write(area, settling.LEFT_OUT, sorted(layer.left_out))
        unpacker.finish()
        return Unpacked(layer.size, layer.inodes, unpacker.opaque)


def _told_of(entry: tar.Entry, error: OSError | LayerError) -> SnapshotError:
    """The error with the entry's name in front."""
    what = f"{entry.kind} {shown(entry.name)}"
    if isinstance(error, LayerError):
        return type(error)(f"{what}: {error}")
    if error.errno in _HOST_ERRORS:
        return SnapshotError(f"cannot make {what}: {error.strerror}")
    return LayerError(f"{what}: {_REASONS.get(error.errno or 0, error.strerror)}")


class _Unpacker:
    def __init__(self, reader: tar.TarReader, root: LayerRoot) -> None:
        self._reader = reader
        self._root = root
        self.opaque = False
        self._times: dict[bytes, int] = {}
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
        """Make one entry. It replaces what an earlier entry has made under its name."""
        parent, _, base = entry.name.rpartition(b"/")
        if base in (b"", b".", b".."):
            parent, base = split(entry.name)
            if not base:
                self._change_root(entry)
                return
        if WHITEOUT in entry.name and self._is_mark(entry, parent, base):
            return
        maker = self._makers[entry.kind]
        fd = self._root.open_parent(parent)
        try:
            maker(fd, base, entry)
        except FileExistsError:
            self._root.clear(fd, base)
            maker(fd, base, entry)

    def finish(self) -> None:
        """Remove what was outside of the root, and set the default access lists and the times of directories.

        Both come last. A new file takes over its directory's default list, and changes the directory's time.
        """
        self._root.remove_pseudo_links()
        for name, value in self._default_lists.items():
            with self._root.opened(name) as fd:
                if fd is not None:
                    self._set_access_list(fd, _DEFAULT_LIST, value)
        for name, mtime in self._times.items():
            with self._root.opened(name) as fd:
                if fd is not None:
                    os.utime(fd, ns=(mtime, mtime))

    def _file(self, fd: int, base: bytes, entry: tar.Entry, *, fresh: bool = True) -> None:
        file = os.open(base, _NEW_FILE, entry.mode & 0o777, dir_fd=fd)
        try:
            if entry.extents is None:
                for piece in self._reader.content():
                    written = os.write(file, piece)
                    while written < len(piece):
                        written += os.write(file, piece[written:])
            else:
                self._fill(file, entry.size, entry.extents)
            self._set_attributes(file, entry, fresh=fresh)
            os.utime(file, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(file)
        self._root.account(entry.size if entry.extents is None else sum(length for _, length in entry.extents))

    def _fill(self, file: int, size: int, extents: tuple[tuple[int, int], ...]) -> None:
        """Write a sparse file: the content goes into its ``extents``, with holes between them."""
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
        fresh = self._root.make_directory(fd, base, entry.mode & 0o777)
        if not fresh or entry.mode & 0o7000 or entry.uid or entry.gid or entry.xattrs or not self._root.root_owned:
            directory = os.open(base, _DIRECTORY, dir_fd=fd)
            try:
                self._set_attributes(directory, entry, fresh=False)
                if not fresh:
                    self._root.has_entry(directory)
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
        """Make a device node. If the kernel refuses it to this user namespace, it is left out, as in containerd.

        The node is never opened here, and in a container the device cgroup says who may open it. The device 0:0 is
        overlayfs's whiteout.
        """
        kind = stat.S_IFBLK if entry.kind is tar.BLOCK_DEVICE else stat.S_IFCHR
        try:
            os.mknod(base, kind | entry.mode & 0o777, entry.device, dir_fd=fd)
        except PermissionError:
            return
        if kind == stat.S_IFCHR and entry.device == 0:
            self._root.note_whiteout()
        self._finish_special(fd, base, entry)

    def _link(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        parent, target = split(entry.link)
        if not target:
            raise LayerError("has the layer's root as its target")
        try:
            if parent == PSEUDO_LINKS:
                source = self._root.open_pseudo_links()
            else:
                source = fd if parent == self._root.parent else self._root.open_target(parent)
        except OSError as e:
            raise_lack(e)
            raise LayerError(f"has a target {shown(entry.link)} that cannot be reached: {e.strerror}") from e
        try:
            status = status_of(source, target)
            if status is None or is_whiteout(status):
                raise LayerError(f"has a target {shown(entry.link)} that is not in the layer")
            if stat.S_ISDIR(status.st_mode):
                raise LayerError(f"has a directory, {shown(entry.link)}, as its target")
            os.link(target, base, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            if source != fd:
                os.close(source)

    def _is_mark(self, entry: tar.Entry, parent: bytes, base: bytes) -> bool:
        """Whether the entry is a whiteout, which is made here, or one of AUFS's own files, which is left out.

        The files of AUFS's pseudo-links are made outside of the layer's root. They get names in it by hard links.
        """
        if base == OPAQUE_MARK:
            fd = self._root.open_parent(parent)
            self._root.set_opaque(fd)
            if os.path.sameopenfile(fd, self._root.fd):
                self.opaque = True
            return True
        parts = parts_of(entry.name)
        if any(part.startswith(RESERVED) for part in parts):
            if entry.kind is tar.FILE and parts[:-1] == [PSEUDO_LINKS]:
                self._pseudo_link(parts[-1], entry)
            return True
        # A whiteout is told by its last component alone: an entry below a name with ".wh." is an ordinary one.
        if not base.startswith(WHITEOUT):
            return False
        hidden = base.removeprefix(WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise LayerError("is a whiteout that names no file")
        if self._root.hides(parent):
            return True
        fd = self._root.open_parent(parent)
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=fd)
            self._root.note_whiteout()
            self._root.account(0)
        except FileExistsError:
            # A whiteout hides the layers below. A file of this layer hides them too, so it stays.
            status = status_of(fd, hidden)
            if status is not None and stat.S_ISDIR(status.st_mode):
                self._root.make_opaque(fd, hidden)
        return True

    def _pseudo_link(self, base: bytes, entry: tar.Entry) -> None:
        fd = self._root.open_pseudo_links()
        try:
            with suppress(FileNotFoundError):
                os.unlink(base, dir_fd=fd)
            self._file(fd, base, entry, fresh=False)
        finally:
            os.close(fd)

    def _change_root(self, entry: tar.Entry) -> None:
        if entry.kind is tar.LINK and not parts_of(entry.link):
            return  # the root as a hard link to itself, as some builders write it: it is there already
        if entry.kind is not tar.DIRECTORY:
            raise LayerError("stands for the layer's root and is no directory")
        self._set_attributes(self._root.fd, entry, fresh=False)
        self._root.has_entry(self._root.fd)
        self._root.parent = None
        self._times[b"."] = entry.mtime

    def _set_attributes(self, fd: int, entry: tar.Entry, *, fresh: bool) -> None:
        """Set owner, then mode, then extended attributes, as each of these calls may clear what comes after it.

        A ``fresh`` file has its permission bits from its creation, and its owner too if that is root.
        """
        if not fresh or entry.uid or entry.gid or not self._root.root_owned:
            os.chown(fd, entry.uid, entry.gid)
        if not fresh or entry.mode & 0o7000:
            os.chmod(fd, entry.mode)
        for name, value in entry.xattrs.items():
            if name.startswith(b"trusted.overlay."):
                raise LayerError(f"has the attribute {shown(name)}, which is overlayfs's own")
            # 1. Other attributes are left out: they are for the host that built the image (security.selinux,
            #    security.ima).
            # 2. An access list is kept. With one, the mode's group bits are the mask, and without it they would give
            #    the group more than the image does.
            if is_kept(name):
                self._set_kept(fd, name, value)
            elif name == ACCESS_LIST:
                self._set_access_list(fd, name, value)
            elif name == _DEFAULT_LIST:
                self._default_lists[entry.name] = value

    def _set_kept(self, fd: int, name: bytes, value: bytes) -> None:
        """Set an attribute, or leave it out if the file system has no place for it, such as tmpfs before Linux 6.6.

        A capability is not left out: without it a program fails in the container, far from the cause.
        """
        try:
            os.setxattr(fd, name, value)
        except OSError as e:
            # ext4 answers ENOSPC for attributes that do not fit beside an inode.
            too_large = e.errno == errno.ENOSPC and os.fstatvfs(fd).f_bavail
            if name == CAPABILITY or not (e.errno in _NO_PLACE or too_large):
                raise
            self._root.leave_out(name)

    def _set_access_list(self, fd: int, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(fd, name, value)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise

    def _finish_special(self, fd: int, base: bytes, entry: tar.Entry) -> None:
        if entry.uid or entry.gid or not self._root.root_owned:
            os.chown(base, entry.uid, entry.gid, dir_fd=fd, follow_symlinks=False)
        if entry.mode & 0o7000 and entry.kind is not tar.SYMLINK:
            os.chmod(base, entry.mode, dir_fd=fd)
        os.utime(base, ns=(entry.mtime, entry.mtime), dir_fd=fd, follow_symlinks=False)
        self._root.account(0)


def is_kept(name: bytes) -> bool:
    """Whether an extended attribute of a layer is set as it is. Access lists are handled apart."""
    return name.startswith(b"user.") or name == CAPABILITY
