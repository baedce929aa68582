"""Deleting and measuring directory trees that a container or a layer has made.

Such a tree may be deeper than a path, a call stack or the number of open files allows, and it may change while it
is read: names are taken relative to descriptors, links are never followed, and what has gone is no error.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONG_PATH = 900  # characters, of four bytes at most: with one more name still below PATH_MAX


class Usage(NamedTuple):
    """What a directory tree occupies, as du counts it: allocated bytes, and inodes."""

    bytes: int
    inodes: int


def remove(dir_fd: int, name: str) -> None:
    """Delete ``name`` in the directory ``dir_fd``, whatever it is; one that is not there is no error.

    A subdirectory that is not empty is first moved next to ``name`` (as ``name.1``, ``name.2`` ...), so that depth
    costs neither recursion nor descriptors. Raises OSError.
    """
    waiting = [name]
    moved = 0
    while waiting:
        current = waiting.pop()
        try:
            fd = os.open(current, _DIRECTORY, dir_fd=dir_fd)
        except FileNotFoundError:
            continue
        except OSError:
            os.unlink(current, dir_fd=dir_fd)
            continue
        try:
            with os.scandir(fd) as entries:
                # The list is read first: entries may be skipped where a directory changes under its reader.
                names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_directory in names:
                if not is_directory:
                    os.unlink(child, dir_fd=fd)
                elif not _removed_empty(fd, child):
                    moved += 1
                    os.rename(child, f"{name}.{moved}", src_dir_fd=fd, dst_dir_fd=dir_fd)
                    waiting.append(f"{name}.{moved}")
        finally:
            os.close(fd)
        os.rmdir(current, dir_fd=dir_fd)


def measure(path: str) -> Usage:
    """What the tree at ``path`` occupies, itself included; an inode with several links counts once.

    Raises OSError where ``path`` is no directory.
    """
    fd = os.open(path, _DIRECTORY)
    meter = _Meter()
    meter.add_tree(fd)
    return Usage(meter.bytes, meter.inodes)


class _Meter:
    def __init__(self) -> None:
        self.bytes = 0
        self.inodes = 0
        self._linked: set[tuple[int, int]] = set()

    def add_tree(self, top: int) -> None:
        """Add the directory ``top`` and all below it; closes ``top``."""
        self._add(os.fstat(top))
        bases: list[tuple[int, list[str]]] = [(top, ["."])]
        try:
            while bases:
                base, waiting = bases[-1]
                if not waiting:
                    os.close(bases.pop()[0])
                    continue
                path = waiting.pop()
                try:
                    fd = os.open(path, _DIRECTORY, dir_fd=base)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # gone, or replaced, since it was listed
                if len(path) > _LONG_PATH:
                    bases.append((fd, ["."]))
                    continue
                try:
                    waiting += self._add_entries(fd, path)
                finally:
                    os.close(fd)
        finally:
            for base, _ in bases:
                os.close(base)

    def _add_entries(self, fd: int, path: str) -> list[str]:
        directories = []
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                self._add(status)
                if stat.S_ISDIR(status.st_mode):
                    directories.append(f"{path}/{entry.name}")
        return directories

    def _add(self, status: os.stat_result) -> None:
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            inode = (status.st_dev, status.st_ino)
            if inode in self._linked:
                return
            self._linked.add(inode)
        self.bytes += status.st_blocks * 512
        self.inodes += 1


def _removed_empty(dir_fd: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError:
        return False
    return True
