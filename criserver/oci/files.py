"""Reading files that others put on the node: regular ones only, and never more than a bound."""

from __future__ import annotations

import errno
import os
import stat


def read(path: str, limit: int) -> bytes:
    """The content of the file ``path``, ``limit`` bytes at most.

    Raises OSError, its ``strerror`` for an operator to read, also for what is larger or is no regular file.
    """
    # A FIFO at this path must not hold up the daemon.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", path)
        return os.read(fd, limit)
    finally:
        os.close(fd)
