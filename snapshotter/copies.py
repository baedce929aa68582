"""Copying a directory tree of an image, of any depth, with the owners, modes, times and attributes of its files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Set
from contextlib import ExitStack, closing

from snapshotter.file_tree import NameMemory, Names, Place, shortened

_PIECE = 8 << 20
_MAX_PATH = 4095
# Files with several names whose places are kept in memory, and bytes of these places. An image may have millions, made
# by a few bytes each.
_MAX_LINKED, _MAX_PLACES = 100_000, 16 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# The errors of a file system that does not have an attribute.
_LACKING = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.ENODATA})


def copy(source: int, target: int, check: Callable[[], None], hidden: Set[str] = frozenset()) -> None:
    """Copy all that is in the directory ``source`` into the empty directory ``target``: files and their attributes.

    1. Pipes, sockets and devices are made anew. Symbolic links are copied as links.
    2. A file with several names stays one file, except for names whose path is longer than the kernel takes, and for
       files behind the first :data:`_MAX_LINKED`, or with longer places than :data:`_MAX_PLACES` in all.
    3. Holes in files stay holes.
    4. Directories at the paths ``hidden`` are made and left empty.

    No other process may change ``target``. This blocks. It calls ``check`` now and then, which raises an error to end
    the copy early. Raises OSError with the path below ``source``.
    """
    copier = _Copier(target, check, hidden)
    # In the target all directories are new, so their times say nothing about changes by others.
    with closing(Place(source)) as reader, closing(Place(target, lambda _: 0.0)) as writer:
        memory = NameMemory()
        waiting: list[Names] = []
        while True:
            waiting.append(copier.copy_entries(reader, writer, Names(memory)))
            while not reader.enter_next(waiting[-1]):
                if waiting[-1].refill(reader.fd):
                    continue
                _copy_attributes(reader.fd, writer.fd)
                if reader.depth == 0:
                    return
                reader.leave()
                while writer.depth > reader.depth:
                    writer.leave()
                for names in waiting[reader.depth + 1 :]:
                    names.clear()
                del waiting[reader.depth + 1 :]
            writer.enter(reader.name)


class _Copier:
    def __init__(self, target: int, check: Callable[[], None], hidden: Set[str]) -> None:
        self._target = target
        self._check = check
        self._hidden = hidden
        # The directory and the name of the first of several names. All names of a directory share its path in memory.
        self._linked: dict[tuple[int, int], tuple[str, str]] = {}
        self._directory = ""
        self._places = 0

    def copy_entries(self, reader: Place, writer: Place, directories: Names) -> Names:
        """Copy all that is in a directory. Its directories are made, empty; ``directories`` gets their names."""
        self._directory = ""
        if self._hidden and writer.path in self._hidden:
            return directories
        with os.scandir(reader.fd) as entries:
            for entry in entries:
                self._check()
                try:
                    if entry.is_dir(follow_symlinks=False):
                        os.mkdir(entry.name, 0o700, dir_fd=writer.fd)
                        directories.add(entry.name)
                    else:
                        self._copy(entry.name, reader.fd, writer)
                except OSError as e:
                    raise OSError(e.errno, e.strerror, shortened(reader.path_of(entry.name))) from e
        return directories

    def _copy(self, name: str, source: int, writer: Place) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if status.st_nlink > 1 and self._is_linked(name, status, writer):
            return
        if stat.S_ISREG(status.st_mode):
            self._copy_file(name, source, writer.fd)
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=writer.fd)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=writer.fd)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=writer.fd, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=writer.fd)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=writer.fd, follow_symlinks=False)

    def _is_linked(self, name: str, status: os.stat_result, writer: Place) -> bool:
        """Whether the file is copied already under another name; then this name is made as a hard link."""
        inode = (status.st_dev, status.st_ino)
        first = self._linked.get(inode)
        if first is not None:
            path = os.path.join(*first)
            os.link(path, name, src_dir_fd=self._target, dst_dir_fd=writer.fd, follow_symlinks=False)
            return True
        if len(self._linked) < _MAX_LINKED and len(os.fsencode(writer.path_of(name))) <= _MAX_PATH:
            if not self._directory:
                self._directory = writer.path
                self._places += len(self._directory)
            if self._places < _MAX_PLACES:
                self._linked[inode] = self._directory, name
        return False

    def _copy_file(self, name: str, source_dir: int, target_dir: int) -> None:
        with ExitStack() as stack:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            source = os.open(name, flags, dir_fd=source_dir)
            stack.callback(os.close, source)
            target = os.open(name, _NEW_FILE, 0o600, dir_fd=target_dir)
            stack.callback(os.close, target)
            size = os.fstat(source).st_size
            at = 0
            while at < size:
                try:
                    at = os.lseek(source, at, os.SEEK_DATA)
                except OSError as e:
                    if e.errno != errno.ENXIO:
                        raise
                    break  # a hole is at the end
                at = self._copy_data(source, target, at, os.lseek(source, at, os.SEEK_HOLE))
            os.ftruncate(target, size)
            _copy_attributes(source, target)

    def _copy_data(self, source: int, target: int, at: int, end: int) -> int:
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            self._check()
            sent = os.sendfile(target, source, at, min(_PIECE, end - at))
            if sent == 0:
                return end  # the file has become shorter
            at += sent
        return at


def _copy_attributes(source: int, target: int) -> None:
    """Copy owner, mode, extended attributes and times of a file or directory, by descriptors."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    # The mode comes after the owner: chown(2) clears set-user-ID bits and capabilities.
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    try:
        for name in os.listxattr(source):
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as e:
                if e.errno not in _LACKING:
                    raise
    except OSError as e:
        if e.errno not in _LACKING:
            raise
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
