"""Reading files that others have made: the type is checked before the file is opened, the size before it is read.

To open a file can have effects: a FIFO waits for its other end, a tape winds back, a watchdog begins to count.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import AnyStr

from snapshotter import mounts
from snapshotter.errors import raise_lack

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def make_private(path: str) -> None:
    """Make a directory, and missing ones above it, for root alone. A directory that is there stays as it is."""
    if not os.path.isdir(path):
        make_private(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)


def close_to_others(path: str) -> None:
    """Take all permissions of others than owner and group from a directory and from the directories in it."""
    with os.scandir(path) as entries:
        inside = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    for directory in (path, *inside):
        mode = stat.S_IMODE(os.lstat(directory).st_mode)
        if mode & stat.S_IRWXO:
            os.chmod(directory, mode & ~stat.S_IRWXO)


def link_target(name: AnyStr, dir_fd: int) -> AnyStr | None:
    """The target of a symbolic link in a directory; None for anything else. Raises OSError if the node lacks memory."""
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as e:
        raise_lack(e)
        return None


def kind(mode: int) -> str:
    """The type of a file of this mode, in words: "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(
    path: str, limit: int | None = None, *, dir_fd: int = mounts.AT_FDCWD, resolve: int = 0, follow: bool = True
) -> int:
    """A descriptor of the regular file ``path``, of ``limit`` bytes at most, for reading. The caller closes it.

    ``path`` is looked up from the directory ``dir_fd`` as ``resolve`` says (openat2(2)). Without ``follow`` its last
    part must not be a symbolic link. Raises OSError, also for a file that is larger or not regular; its ``strerror``
    is in plain words.
    """
    found = mounts.openat2(dir_fd, path, os.O_PATH | (0 if follow else os.O_NOFOLLOW), resolve)
    try:
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind(status.st_mode)}, not a regular file", path)
        if limit is not None and status.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", path)
        # Opened by the descriptor, as the name may be another file's by now. O_NONBLOCK: do not wait for a lease.
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


def read(path: str, limit: int) -> bytes:
    """The content of the file ``path``, ``limit`` bytes at most. Raises OSError as :func:`open_regular` does."""
    with open(open_regular(path, limit), "rb") as file:
        return file.read(limit)
