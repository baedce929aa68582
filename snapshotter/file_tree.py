"""Walking and measuring directory trees that a container or a layer has made.

1. Such a tree may be deeper than a path, a call stack or the number of open files allows. So each name is looked up
   relative to the descriptor of its directory, and one descriptor is open at a time.
2. Links are never followed. A mount inside the tree is not part of the tree.
3. The tree may change while it is read. A file that has gone is no error.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

from snapshotter.errors import raise_lack
from snapshotter.mounts import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_INSIDE = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
# The errors of openat2 for a name that is no directory, or has gone.
NO_DIRECTORY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

# A process that makes directories all the time must not keep a walk going for ever.
_MAX_CHANGED = 100_000  # directories that others have changed since the walk began
_MAX_MOVED = 100  # how often others have moved a directory that the walk is in
# Bytes of memory for the names of directories that a walk has found and not entered: some million short names. A
# directory may have more directories in it, and is then read again for the next ones. Each directory has room for some
# names, whatever those above it take.
_MAX_NAMES, _MIN_NAMES = 64 << 20, 256 << 10
# The inodes with several names that are told apart; each takes some 100 bytes of memory.
_MAX_LINKED = 500_000
_SHOWN = 250  # characters of a path in an error, at its beginning and at its end


class TreeUsage(NamedTuple):
    """What a directory tree occupies, as du counts it: allocated bytes, and inodes."""

    bytes: int
    inodes: int


class UnsettledError(OSError):
    """Another process changes a tree faster than it can be read or deleted."""


class NameMemory:
    """The memory of the :class:`Names` of one walk, in bytes."""

    def __init__(self) -> None:
        self.left = _MAX_NAMES


class Names:
    """The names of directories in one directory of a walk, which it has still to enter.

    ``cut`` says that there are more of them, for which there was no memory. :meth:`refill` adds the next ones.
    """

    __slots__ = ("_added", "_held", "_memory", "_names", "cut")

    def __init__(self, memory: NameMemory) -> None:
        self._memory = memory
        self._names: list[str] = []
        self._held = self._added = 0
        self.cut = False

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str) -> None:
        """Add a name. Without memory for it ``cut`` is set, and later names are not added either."""
        size = sys.getsizeof(name)
        self.cut = self.cut or (self._held + size > _MIN_NAMES and size > self._memory.left)
        if not self.cut:
            self.put(name)
            self._added += 1

    def put(self, name: str) -> None:
        """Add a name again, whatever memory is left."""
        size = sys.getsizeof(name)
        self._memory.left -= size
        self._held += size
        self._names.append(name)

    def refill(self, fd: int) -> bool:
        """Add the names behind those that were added, where there are more. Returns whether there are names now.

        The directory ``fd`` is read again. Its order is the same as before, unless others change it. Raises OSError.
        """
        if not self.cut:
            return False
        self.cut = False
        with os.scandir(fd) as entries:
            directories = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            for name in itertools.islice(directories, self._added, None):
                self.add(name)
                if self.cut:
                    break
        return bool(self._names)

    def pop(self) -> str:
        """Take off the last name."""
        name = self._names.pop()
        size = sys.getsizeof(name)
        self._memory.left += size
        self._held -= size
        return name

    def clear(self) -> None:
        """Take off all names."""
        while self._names:
            self.pop()


class Place:
    """The directory of a tree that a walk is in. It goes down and up in the tree.

    ``fd`` is open until the next step. Of the directories above only the names, and the device and inode numbers, are
    kept. Methods raise OSError with the path below the top.
    """

    def __init__(self, top: int, changed: Callable[[os.stat_result], float] = lambda status: status.st_ctime) -> None:
        """Begin at the directory ``top``, which the caller keeps open.

        ``changed`` returns when another process has last changed a directory, in Unix seconds. A caller that itself
        changes directories before the walk comes to them gives a function that leaves its own changes out.
        """
        self._top = top
        self._changed_at = changed
        self.fd = os.dup(top)
        self._names: list[str] = []
        self._numbers = [_number(os.fstat(top))]
        self._began = time.time()
        self._changed = self._moved = 0

    def close(self) -> None:
        """Close the descriptor."""
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
        """The path below the top; "" at the top itself."""
        return "/".join(self._names)

    def path_of(self, name: str) -> str:
        """The path below the top of something in the directory."""
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
        # A time in the future does not count: the clock was set back.
        if self._began < self._changed_at(status) <= time.time():
            self._changed += 1
            if self._changed > _MAX_CHANGED:
                raise UnsettledError(errno.EBUSY, "somebody makes directories all the time", shortened(self.path))

    def enter_next(self, names: Names) -> bool:
        """Go down into the last of the directories ``names`` that is still there; False if none is.

        A directory with a mount on it is skipped. The names that were tried are taken off the list.
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
        """Go up, and return the name of the directory that was left.

        "" means that this directory, or one above it, has been moved. The place is then the deepest directory on the
        path that has not been moved. Raises OSError if the node lacks descriptors or memory.
        """
        left = self._names.pop()
        self._numbers.pop()
        try:
            fd = os.open("..", _DIRECTORY, dir_fd=self.fd)
        except OSError as e:
            raise_lack(e)
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
            except OSError as e:
                raise_lack(e)
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
    """Everything below the directory ``top``, each entry with the place that it is in. Directories come first.

    A place is valid until the next step. A directory with a mount on it is yielded, and not entered. ``changed`` is the
    parameter of :class:`Place`. Raises OSError with the path below ``top`` if a directory cannot be read, and
    UnsettledError if other processes make new directories all the time.
    """
    with closing(Place(top, changed)) as place:
        memory = NameMemory()
        waiting: list[Names] = []
        while True:
            directories = Names(memory)
            try:
                with os.scandir(place.fd) as entries:
                    for entry in entries:
                        is_directory = entry.is_dir(follow_symlinks=False)
                        yield place, entry
                        if is_directory:
                            directories.add(entry.name)
            except FileNotFoundError:
                pass  # the directory has gone
            except OSError as e:
                raise OSError(e.errno, e.strerror, shortened(place.path)) from e
            waiting.append(directories)
            while not place.enter_next(waiting[-1]):
                if waiting[-1].refill(place.fd):
                    continue
                if place.depth == 0:
                    return
                place.leave()
                for names in waiting[place.depth + 1 :]:
                    names.clear()
                del waiting[place.depth + 1 :]


def measure(path: str) -> TreeUsage:
    """What the tree at ``path`` occupies, itself included; an inode with several links counts once.

    The links of inodes behind the first :data:`_MAX_LINKED` with several links count each. Raises OSError where
    ``path`` is no directory, or cannot be read.
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
                if len(linked) < _MAX_LINKED:
                    linked.add(inode)
            size += status.st_blocks * 512
            inodes += 1
    finally:
        os.close(top)
    return TreeUsage(size, inodes)


def shortened(path: str) -> str:
    """A path for an error. The middle of a very long path is left out."""
    return path if len(path) <= 2 * _SHOWN else f"{path[:_SHOWN]}…{path[-_SHOWN:]}"


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
