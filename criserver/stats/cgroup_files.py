"""Small files of the kernel: read again and again by a descriptor that is kept open, or read once."""

from __future__ import annotations

import os

# Bytes of one read. Files that a container can make long, such as cgroup.procs, are read as a whole instead.
_FILE_SIZE = 16 << 10
_MAX_WHOLE_SIZE = 1 << 20


class DescriptorBudget:
    """How many more descriptors may stay open."""

    def __init__(self, left: int) -> None:
        self.left = left


class KeptFiles:
    """Small files that are read again and again. Their descriptors stay open while the budget allows it."""

    def __init__(self, budget: DescriptorBudget) -> None:
        self._budget = budget
        self._kept: dict[str, int] = {}

    def read(self, path: str) -> bytes:
        """The bytes of the file now; empty where it cannot be read."""
        if (fd := self._kept.get(path)) is not None:
            try:
                return os.pread(fd, _FILE_SIZE, 0)
            except OSError:
                self._drop(path)  # its cgroup is gone, but there may be a new one with the same name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        if self._budget.left > 0:
            self._budget.left -= 1
            self._kept[path] = fd
        try:
            return os.pread(fd, _FILE_SIZE, 0)
        except OSError:
            return b""
        finally:
            if path not in self._kept:
                os.close(fd)

    def close(self) -> None:
        """Close all descriptors."""
        for path in list(self._kept):
            self._drop(path)

    def _drop(self, path: str) -> None:
        os.close(self._kept.pop(path))
        self._budget.left += 1


def read_whole(path: str) -> bytes:
    """A whole file, up to 1 MiB; empty where it cannot be read. The kernel returns a long list page by page.

    A file object takes twice the time: it asks for the file's kind, size and position first.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            whole = piece = os.read(fd, _FILE_SIZE)
            while piece and len(whole) < _MAX_WHOLE_SIZE:
                piece = os.read(fd, _FILE_SIZE)
                whole += piece
            return whole
        finally:
            os.close(fd)
    except OSError:
        return b""
