"""Walking, measuring and deleting directory trees that a container or a layer has made.

Such a tree may be deeper than a path, a call stack or the number of open files allows, its names may be any bytes, and
it may change while it is read. So names are taken relative to descriptors, of which one is open at a time; links are
never followed; what is mounted in a tree is not of it; and what has gone is no error.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

from snapshotter.mounts import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_INSIDE = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
# What openat2 says of a name that is no directory, or none any more.
_NO_DIRECTORY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

# linux/fs.h: the attributes of chattr(1), and how they are read and written.
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_FASTENED = 0x10 | 0x20  # immutable, append-only

# Whoever makes files all the time is not to keep a walk going for ever: how many directories may have been changed by
# others since it began, how often one that was emptied may have got something again, with how many seconds between,
# and how often the way back up may have been moved.
_MAX_CHANGED = 100_000
_MAX_REFILLED, _PAUSE = 100, 0.01
_MAX_MOVED = 100
_SHOWN = 250  # characters of a path in an error, at its beginning and at its end


class Usage(NamedTuple):
    """What a directory tree occupies, as du counts it: allocated bytes, and inodes."""

    bytes: int
    inodes: int


class UnsettledError(OSError):
    """A tree is changed by somebody faster than it can be read or deleted."""


class Place:
    """A directory of a tree, which goes down and up in it.

    ``fd`` is open until then. Of the directories above it there are the names, and the numbers that they are known by.
    Raises OSError with the path below the top.
    """

    def __init__(self, top: int, changed: Callable[[os.stat_result], float] = lambda status: status.st_ctime) -> None:
        """Begin at the directory ``top``, which its caller keeps open.

        ``changed`` tells when somebody has changed a directory last, in Unix seconds. Whoever changes directories that
        it has not been in yet has to tell its own changes from others'.
        """
        self._top = top
        self._changed_at = changed
        self.fd = os.dup(top)
        self._names: list[str] = []
        self._numbers = [_number(os.fstat(top))]
        self._began = time.time()
        self._changed = self._moved = 0

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self.fd)

    @property
    def depth(self) -> int:
        """How many directories it is below the top."""
        return len(self._names)

    @property
    def name(self) -> str:
        """Its name in the directory above; "" at the top."""
        return self._names[-1] if self._names else ""

    @property
    def number(self) -> int:
        """Its inode number."""
        return self._numbers[-1][1]

    @property
    def path(self) -> str:
        """The way from the top; "" at the top itself."""
        return "/".join(self._names)

    def path_of(self, name: str) -> str:
        """The way from the top to something in the directory."""
        return "/".join((*self._names, name))

    def enter(self, name: str) -> None:
        """Go down into the directory ``name``.

        Raises OSError: EXDEV where a file system is mounted there, ENOENT, ENOTDIR or ELOOP where it is no directory.
        """
        fd = openat2(self.fd, name, _DIRECTORY, _INSIDE)
        status = os.fstat(fd)
        self._move(fd)
        self._names.append(name)
        self._numbers.append(_number(status))
        # A time to come is a clock that was set back.
        if self._began < self._changed_at(status) <= time.time():
            self._changed += 1
            if self._changed > _MAX_CHANGED:
                raise UnsettledError(errno.EBUSY, "somebody makes directories all the time", shortened(self.path))

    def enter_next(self, names: list[str]) -> bool:
        """Go down into the last of the directories ``names`` that is there still; False where none is.

        What is mounted on one is passed over. What was looked at is taken off the list.
        """
        while names:
            name = names.pop()
            try:
                self.enter(name)
            except UnsettledError:
                raise
            except OSError as e:
                if e.errno not in _NO_DIRECTORY and e.errno != errno.EXDEV:
                    raise OSError(e.errno, e.strerror, shortened(self.path_of(name))) from e
            else:
                return True
        return False

    def leave(self) -> str:
        """Go up, and return the name of the directory that was left; "" where that, or one above, has been moved.

        Then it is at the deepest directory on the way that is still where it was.
        """
        left = self._names.pop()
        self._numbers.pop()
        try:
            fd = os.open("..", _DIRECTORY, dir_fd=self.fd)
        except OSError:
            self._find_again()
            return ""
        if _number(os.fstat(fd)) == self._numbers[-1]:
            self._move(fd)
            return left
        os.close(fd)
        self._find_again()
        return ""

    def _find_again(self) -> None:
        self._moved += 1
        if self._moved > _MAX_MOVED:
            raise UnsettledError(errno.EBUSY, "somebody moves directories all the time", self.path)
        names, numbers = self._names, self._numbers
        self._move(os.dup(self._top))
        self._names, self._numbers = [], numbers[:1]
        for name, number in zip(names, numbers[1:], strict=True):
            try:
                fd = openat2(self.fd, name, _DIRECTORY, _INSIDE)
            except OSError:
                return
            if _number(os.fstat(fd)) != number:
                os.close(fd)
                return
            self._move(fd)
            self._names.append(name)
            self._numbers.append(number)

    def _move(self, fd: int) -> None:
        os.close(self.fd)
        self.fd = fd


def walk(
    top: int, changed: Callable[[os.stat_result], float] = lambda status: status.st_ctime
) -> Iterator[tuple[Place, os.DirEntry[str]]]:
    """Everything below the directory ``top``, each with the place that it is in; directories before what is in them.

    A place is good until the next step. What is mounted in there is told of as the directory that it is on, and not
    gone into. ``changed`` is :class:`Place`'s. Raises OSError with the path below ``top`` where a directory cannot be
    read, UnsettledError where others make new ones all the time.
    """
    with closing(Place(top, changed)) as place:
        waiting: list[list[str]] = []
        while True:
            directories: list[str] = []
            try:
                with os.scandir(place.fd) as entries:
                    for entry in entries:
                        is_directory = entry.is_dir(follow_symlinks=False)
                        yield place, entry
                        if is_directory:
                            directories.append(entry.name)
            except FileNotFoundError:
                pass  # the directory has gone
            except OSError as e:
                raise OSError(e.errno, e.strerror, shortened(place.path)) from e
            waiting.append(directories)
            while not place.enter_next(waiting[-1]):
                if place.depth == 0:
                    return
                place.leave()
                del waiting[place.depth + 1 :]


def measure(path: str) -> Usage:
    """What the tree at ``path`` occupies, itself included; an inode with several links counts once.

    Raises OSError where ``path`` is no directory, or cannot be read.
    """
    top = os.open(path, _DIRECTORY)
    try:
        status = os.fstat(top)
        size, inodes = status.st_blocks * 512, 1
        linked: set[int] = set()
        for _, entry in walk(top):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                inode = status.st_dev << 64 | status.st_ino
                if inode in linked:
                    continue
                linked.add(inode)
            size += status.st_blocks * 512
            inodes += 1
    finally:
        os.close(top)
    return Usage(size, inodes)


def remove_path(path: str) -> None:
    """Delete what is at ``path``, as :func:`remove` does; where its directory is not there, that is no error."""
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
    """Delete ``name`` in the directory ``dir_fd``, whatever it is; one that is not there is no error.

    Without ``files`` only directories are deleted, and their files go with them: cgroups. Files that are immutable or
    append-only (chattr(1)) are made ordinary first. What is in a file system that is mounted there stays. All that can
    be deleted is; then OSError is raised for the first thing that cannot, with its path and in words what hinders it,
    UnsettledError where others make new things all the time.
    """
    with closing(_Remover(dir_fd, files=files)) as remover:
        remover.remove(name)


class _Level:
    """A directory that is being deleted: what is still to be deleted in it, and whether something has to stay."""

    __slots__ = ("stuck", "waiting")

    def __init__(self, waiting: list[str]) -> None:
        self.waiting = waiting
        self.stuck = False


class _Remover:
    def __init__(self, dir_fd: int, *, files: bool) -> None:
        self._top = dir_fd
        self._files = files
        self._place = Place(dir_fd)
        self._levels: list[_Level] = []
        self._refilled = 0
        self._failure: OSError | None = None
        self._failures = 0

    def close(self) -> None:
        self._place.close()

    def remove(self, name: str) -> None:
        place, levels = self._place, self._levels
        levels.append(_Level([name]))
        while len(levels) > 1 or levels[0].waiting:
            if levels[-1].waiting:
                self._begin(levels[-1].waiting.pop())
                continue
            done = levels.pop()
            left = place.leave()
            # What was moved meanwhile is met again, or is of the tree no more.
            del levels[place.depth + 1 :]
            if not left:
                continue
            if done.stuck:
                levels[-1].stuck = True
            else:
                self._end(left)
        if self._failure is not None:
            more = f" (and {self._failures - 1} more)" if self._failures > 1 else ""
            raise type(self._failure)(
                self._failure.errno, f"{self._failure.strerror}{more}", self._failure.filename
            ) from self._failure

    def _begin(self, name: str) -> None:
        """Go into a directory and delete all in it but the directories that are not empty."""
        try:
            self._place.enter(name)
        except UnsettledError as e:
            raise UnsettledError(e.errno, e.strerror, self._path(name)) from e
        except OSError as e:
            if e.errno == errno.EXDEV:
                self._fail(name, OSError(errno.EBUSY, "a file system is mounted there; unmount it first"))
            elif e.errno not in _NO_DIRECTORY:
                self._fail(name, e)
            elif self._files:
                self._unlink(name)
            return
        level = _Level([])
        self._levels.append(level)
        try:
            with os.scandir(self._place.fd) as entries:
                # One that is skipped, as the directory changes under its reader, is met when this is to be deleted.
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not _removed_empty(self._place.fd, entry.name):
                            level.waiting.append(entry.name)
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
            self._levels[-1].waiting.append(name)  # it was replaced
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                self._fail(name, e)
                return
            self._refilled += 1
            if self._refilled > _MAX_REFILLED:
                words = "somebody makes files in it faster than they can be deleted"
                raise UnsettledError(e.errno, words, self._path(name)) from e
            time.sleep(_PAUSE)
            self._levels[-1].waiting.append(name)

    def _unlink(self, name: str) -> None:
        try:
            self._delete(os.unlink, name)
        except IsADirectoryError:
            self._levels[-1].waiting.append(name)  # it was replaced
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
        """Remember why something stays, and with it all directories that it is in."""
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
    """Take the attributes from a directory and from what is ``name`` in it that hinder its deletion; had they any.

    Raises PermissionError where they have, and it may not.
    """
    found = False
    for file in (".", name):
        path = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            # Only these have attributes, and to open a device or a pipe may do more than that.
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
        return False  # the file system has none
    if not flags[0] & _FASTENED:
        return False
    flags[0] &= ~_FASTENED
    try:
        fcntl.ioctl(fd, _SET_FLAGS, flags)
    except OSError as e:
        words = "it is immutable or append-only; run `chattr -i -a` on it and on its directory"
        raise PermissionError(errno.EPERM, words) from e
    return True


def shortened(path: str) -> str:
    """A path as an error may carry it: one that is deeper than anybody reads has its middle left out."""
    return path if len(path) <= 2 * _SHOWN else f"{path[:_SHOWN]}…{path[-_SHOWN:]}"


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
