"""Walking and measuring directory trees that a container or a layer has made.

1. Such a tree may be deeper than a path, a call stack or the number of open files allows. So each name is looked up
   relative to the descriptor of its directory, and one descriptor is open at a time.
2. Links are never followed. A mount inside the tree is not part of the tree.
3. The tree may change while it is read. A file that has gone is no error.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

from snapshotter.mounts import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_INSIDE = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
# The errors of openat2 for a name that is no directory, or has gone.
NO_DIRECTORY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

# A process that makes directories all the time must not keep a walk going for ever.
_MAX_CHANGED = 100_000  # directories that others have changed since the walk began
_MAX_MOVED = 100  # how often others have moved a directory that the walk is in
_SHOWN = 250  # characters of a path in an error, at its beginning and at its end


class TreeUsage(NamedTuple):
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
                if e.errno not in NO_DIRECTORY and e.errno != errno.EXDEV:
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


def measure(path: str) -> TreeUsage:
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
    return TreeUsage(size, inodes)


def shortened(path: str) -> str:
    """A path as an error may carry it: one that is deeper than anybody reads has its middle left out."""
    return path if len(path) <= 2 * _SHOWN else f"{path[:_SHOWN]}…{path[-_SHOWN:]}"


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
