"""A second copy of records, a file each, below a directory that ends with the boot.

What a record describes (mounts, namespaces, processes) ends with the boot as well. If the database is lost, emptied or
replaced by an older one under running pods, this copy still has the records of all of them.

A record is written here before it is written to the database, and deleted here after it. So the copy is never older.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import structlog

log = structlog.get_logger(__name__)

_UNFINISHED = ".new"


class Mirror:
    """The files ``directory/TABLE/KEY`` of some tables. Keys are file names. All methods block."""

    def __init__(self, directory: str, tables: frozenset[str]) -> None:
        """Make the directories, for root alone: records hold environment variables. Raises OSError."""
        self._directory = directory
        self.tables = tables
        for table in tables:
            os.makedirs(os.path.join(directory, table), mode=0o700, exist_ok=True)

    def items(self) -> Iterator[tuple[str, str, bytes]]:
        """Table, key and value of each record; a file that cannot be read is left out and logged."""
        for table in sorted(self.tables):
            for key in sorted(os.listdir(os.path.join(self._directory, table))):
                path = self._path(table, key)
                if key.endswith(_UNFINISHED):
                    with suppress(OSError):
                        os.unlink(path)
                    continue
                try:
                    with open(path, "rb") as f:
                        yield table, key, f.read()
                except OSError as e:
                    log.warning("the copy of a record cannot be read", path=path, error=str(e))

    def put(self, table: str, key: str, value: bytes | None) -> None:
        """Write a record in place of the key's last one, or delete it for None.

        A copy that cannot be written is deleted, so that none is older than the database. Raises OSError if not even
        that works.
        """
        path = self._path(table, key)
        if value is not None:
            try:
                self._write(path, value)
                return
            except OSError as e:
                log.warning("the copy of a record cannot be written", path=path, error=str(e))
        for name in (path, path + _UNFINISHED):
            with suppress(FileNotFoundError):
                os.unlink(name)

    def _write(self, path: str, value: bytes) -> None:
        fd = os.open(path + _UNFINISHED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, value)
        finally:
            os.close(fd)
        os.rename(path + _UNFINISHED, path)

    def _path(self, table: str, key: str) -> str:
        return os.path.join(self._directory, table, key)
