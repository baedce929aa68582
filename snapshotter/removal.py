"""Deleting directory trees that a container or a layer has made; snapshotter.file_tree says what such a tree may be."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import closing

from snapshotter.file_tree import NO_DIRECTORY, NameMemory, Names, Place, UnsettledError, shortened

# linux/fs.h: the attributes of chattr(1), and how they are read and written.
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_FASTENED = 0x10 | 0x20  # immutable, append-only

# A process that makes files all the time must not keep a deletion going for ever: how often a directory that was
# emptied may have new files, and the seconds between two attempts to delete it.
_MAX_REFILLED, _PAUSE = 100, 0.01
# How often a directory that has too many directories in it is read again, after those that were remembered are deleted.
_MAX_PORTIONS = 100_000


def remove_path(path: str) -> None:
    """Delete what is at ``path``, as :func:`remove` does. It is no error if the directory of ``path`` is missing."""
    directory, name = os.path.split(os.path.abspath(path))
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        remove(fd, name)
    finally:
        os.close(fd)


def remove(dir_fd: int, name: str, *, files: bool = True) -> None:
    """Delete the file or tree ``name`` in the directory ``dir_fd``. It is no error if it is missing.

    1. Without ``files`` only directories are deleted: the files of a cgroup go with its directory.
    2. Immutable and append-only files (chattr(1)) are made ordinary first.
    3. A mount in the tree, and all that is in it, stays.
    4. All that can be deleted is deleted, with one exception: if a directory has more directories in it than are
       remembered at once, and one of them cannot be deleted, those behind it stay too. Then OSError is raised for the
       first failure, with the path and the reason.
       UnsettledError is raised if other processes make new files all the time.
    """
    with closing(_Remover(dir_fd, files=files)) as remover:
        remover.remove(name)


class _Level:
    """A directory that is being deleted.

    ``waiting`` are the names that are still to be deleted in it. ``stuck`` says that something in it cannot be deleted.
    """

    __slots__ = ("stuck", "waiting")

    def __init__(self, memory: NameMemory) -> None:
        self.waiting = Names(memory)
        self.stuck = False


class _Remover:
    def __init__(self, dir_fd: int, *, files: bool) -> None:
        self._top = dir_fd
        self._files = files
        self._place = Place(dir_fd)
        self._levels: list[_Level] = []
        self._memory = NameMemory()
        self._refilled = self._portions = 0
        self._failure: OSError | None = None
        self._failures = 0

    def close(self) -> None:
        self._place.close()

    def remove(self, name: str) -> None:
        place, levels = self._place, self._levels
        levels.append(_Level(self._memory))
        levels[0].waiting.put(name)
        while len(levels) > 1 or levels[0].waiting:
            if levels[-1].waiting:
                self._begin(levels[-1].waiting.pop())
                continue
            done = levels.pop()
            left = place.leave()
            # A directory that was moved meanwhile is met again in its new place, or has left the tree.
            for level in levels[place.depth + 1 :]:
                level.waiting.clear()
            del levels[place.depth + 1 :]
            if not left:
                continue
            if done.stuck:
                levels[-1].stuck = True
            elif done.waiting.cut and self._portions < _MAX_PORTIONS:
                self._portions += 1
                self._wait(left)
            else:
                self._end(left)
        if self._failure is not None:
            more = f" (and {self._failures - 1} more)" if self._failures > 1 else ""
            raise type(self._failure)(
                self._failure.errno, f"{self._failure.strerror}{more}", self._failure.filename
            ) from self._failure

    def _begin(self, name: str) -> None:
        """Go into a directory and delete all in it except for directories that are not empty."""
        try:
            self._place.enter(name)
        except UnsettledError as e:
            raise UnsettledError(e.errno, e.strerror, self._path(name)) from e
        except OSError as e:
            if e.errno == errno.EXDEV:
                self._fail(name, OSError(errno.EBUSY, "a file system is mounted there; unmount it first"))
            elif e.errno not in NO_DIRECTORY:
                self._fail(name, e)
            elif self._files:
                self._unlink(name)
            return
        level = _Level(self._memory)
        self._levels.append(level)
        try:
            with os.scandir(self._place.fd) as entries:
                # scandir may skip an entry while the directory changes. rmdir fails then, and _end() tries again.
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not _removed_empty(self._place.fd, entry.name):
                            level.waiting.add(entry.name)
                            if level.waiting.cut:
                                break  # it is read again once these are deleted
                    elif self._files:
                        self._unlink(entry.name)
        except FileNotFoundError:
            pass  # the directory has gone
        except OSError as e:
            self._fail(".", e)

    def _end(self, name: str) -> None:
        """Delete a directory that has been emptied."""
        try:
            self._delete(os.rmdir, name)
        except NotADirectoryError:
            self._wait(name)  # a file has replaced it
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                self._fail(name, e)
                return
            self._refilled += 1
            if self._refilled > _MAX_REFILLED:
                words = "somebody makes files in it faster than they can be deleted"
                raise UnsettledError(e.errno, words, self._path(name)) from e
            time.sleep(_PAUSE)
            self._wait(name)

    def _wait(self, name: str) -> None:
        """Delete ``name`` again later."""
        self._levels[-1].waiting.put(name)

    def _unlink(self, name: str) -> None:
        try:
            self._delete(os.unlink, name)
        except IsADirectoryError:
            self._wait(name)  # a directory has replaced it
        except OSError as e:
            if e.errno == errno.EBUSY:
                e = OSError(errno.EBUSY, "something is mounted on it; unmount it first")
            self._fail(name, e)

    def _delete(self, call: Callable[..., None], name: str) -> None:
        try:
            try:
                call(name, dir_fd=self._place.fd)
            except PermissionError:
                if not _loosened(self._place.fd, name):
                    raise
                call(name, dir_fd=self._place.fd)
        except FileNotFoundError:
            pass

    def _fail(self, name: str, error: OSError) -> None:
        """Remember why a file cannot be deleted. The directories above it stay too."""
        self._levels[-1].stuck = True
        self._failures += 1
        if self._failure is None:
            self._failure = OSError(error.errno, error.strerror, self._path(name))

    def _path(self, name: str) -> str:
        try:
            above = os.readlink(f"/proc/self/fd/{self._top}")
        except OSError:
            above = ""  # there is no /proc
        return shortened(os.path.normpath(os.path.join(above, self._place.path_of(name))))


def _removed_empty(dir_fd: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError:
        return False
    return True


def _loosened(dir_fd: int, name: str) -> bool:
    """Clear the immutable and append-only attributes of a directory and of ``name`` in it. Returns whether any was set.

    Raises PermissionError if one is set and must not be cleared.
    """
    found = False
    for file in (".", name):
        path = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            # Only files and directories have attributes, and opening a device or a pipe may have effects.
            mode = os.fstat(path).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                fd = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    found = _loosen(fd) or found
                finally:
                    os.close(fd)
        finally:
            os.close(path)
    return found


def _loosen(fd: int) -> bool:
    flags = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _GET_FLAGS, flags)
    except OSError:
        return False  # the file system has no such attributes
    if not flags[0] & _FASTENED:
        return False
    flags[0] &= ~_FASTENED
    try:
        fcntl.ioctl(fd, _SET_FLAGS, flags)
    except OSError as e:
        words = "it is immutable or append-only; run `chattr -i -a` on it and on its directory"
        raise PermissionError(errno.EPERM, words) from e
    return True
