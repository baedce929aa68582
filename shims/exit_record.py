"""The exit record on disk: how a container ended, for a daemon that was not there."""

from __future__ import annotations

import os

from .lean import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .messages import ExitRecord

_NAME = "exit.json"


def exit_code(status: int) -> int:
    """The exit code for a child's status, which is minus a signal's number: then 128 and that number, as in shells."""
    return status if status >= 0 else 128 - status


def save(record: ExitRecord) -> bool:
    """Write the record to the current directory so that it survives a crash of the machine; False: try again later.

    Where the directory itself is gone, nobody will look there. That counts as done.
    """
    try:
        fd = os.open(_NAME + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, dumps(record).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(_NAME + ".tmp", _NAME)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
