"""A second copy of all records, a file each, below a directory that ends with the boot.

If the database is lost, emptied or replaced by an older one under running pods, this copy still has the records of all
of them. It ends with the boot as the pods do, so it never brings back anything that is gone.

A record is written here before it is written to the database, and deleted here after it. So the copy is never older.
Several records that change together are written down first: a daemon that is killed among them leaves no half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import quote

import structlog

log = structlog.get_logger(__name__)

_UNFINISHED = ".new"
# A file that is there while the copy has all records.
_WHOLE = "whole"
# The changes that are made together at present.
_TOGETHER = "together"
_MAX_NAME = 200


class Mirror:
    """The files ``directory/TABLE/NAME``: a line with the key, and then the value. All methods block."""

    def __init__(self, directory: str, tables: Iterable[str]) -> None:
        """Make the directories, for root alone: records hold environment variables. Raises OSError."""
        self._directory = directory
        self._tables = sorted(tables)
        # The records whose copy could not be deleted, and whether the changes that are made together are still listed.
        self._left = set[tuple[str, str]]()
        self._listed = False
        for path in (directory, *(os.path.join(directory, table) for table in self._tables)):
            os.makedirs(path, mode=0o700, exist_ok=True)

    @property
    def is_whole(self) -> bool:
        """Whether every record has its copy, so that what has none was deleted in this boot."""
        return os.path.exists(os.path.join(self._directory, _WHOLE))

    def mark_whole(self) -> None:
        """Every record has its copy now. It stays so until one cannot be written. Raises OSError."""
        os.close(os.open(os.path.join(self._directory, _WHOLE), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    @contextmanager
    def together(self, changes: Sequence[tuple[str, str, bytes | None]]) -> Iterator[None]:
        """The changes of the block: table, key, value (None deletes). After a kill :meth:`finish` makes all of them."""
        if self._listed:
            self._end_list()
        if len(changes) > 1:
            path = os.path.join(self._directory, _TOGETHER)
            texts = [(table, key, None if data is None else data.decode("latin-1")) for table, key, data in changes]
            try:
                _write(path, json.dumps(texts).encode())
            except OSError as e:
                log.warning("changes that belong together cannot be written down", path=path, error=str(e))
        try:
            yield
        finally:
            if len(changes) > 1:
                self._end_list()

    def _end_list(self) -> None:
        # A list that stays would bring old values back at a later start.
        self._listed = True
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, _TOGETHER))
        self._listed = False

    def agree(self, stored: Callable[[str, str], bytes | None], *changed: tuple[str, str]) -> None:
        """Give records the copies of what is ``stored``: those ``changed``, and those that an earlier error has left.

        A copy that can't be deleted is logged, and the next call tries it again.
        """
        for table, key in sorted({*self._left, *changed}):
            try:
                self.put(table, key, stored(table, key))
            except OSError as e:
                log.warning("the copy of a record cannot be deleted", path=self.path(table, key), error=str(e))

    def finish(self) -> None:
        """Make the changes that an earlier daemon was making together. Raises OSError."""
        path = os.path.join(self._directory, _TOGETHER)
        with suppress(FileNotFoundError):
            os.unlink(path + _UNFINISHED)
        try:
            with open(path, "rb") as f:
                changes = json.load(f)
        except FileNotFoundError:
            return
        for table, key, value in changes:
            self.put(table, key, None if value is None else value.encode("latin-1"))
        os.unlink(path)

    def items(self, known: Mapping[tuple[str, str], bytes]) -> Iterator[tuple[str, str, bytes]]:
        """Table, key and value of each record, once.

        A file that cannot be read, or is damaged, is deleted, left out and logged. The copy is not whole any more then.
        ``known`` are the records of the database. Most values are JSON: where one of the two values begins as an object
        does, the copy must be an object.
        """
        for table in self._tables:
            for name in sorted(os.listdir(os.path.join(self._directory, table))):
                path = os.path.join(self._directory, table, name)
                if name.endswith(_UNFINISHED):
                    with suppress(OSError):
                        os.unlink(path)
                    continue
                try:
                    key, value = self._read(table, path)
                    before = known.get((table, key), b"")
                    if value != before and b"{" in (value[:1], before[:1]):
                        json.loads(value)
                except (OSError, ValueError) as e:
                    log.warning("the copy of a record cannot be read", path=path, error=str(e))
                    self._not_whole()
                    with suppress(OSError):
                        os.unlink(path)
                    continue
                yield table, key, value

    def put(self, table: str, key: str, value: bytes | None) -> None:
        """Write a record in place of the key's last one, or delete it for None.

        A copy that cannot be written is deleted, so that none is older than the database. Raises OSError if not even
        that works; :meth:`agree` tries it again.
        """
        path = self.path(table, key)
        if value is not None:
            try:
                _write(path, key.encode() + b"\n" + value)
                self._left.discard((table, key))
                return
            except OSError as e:
                log.warning("the copy of a record cannot be written", path=path, error=str(e))
        self._left.add((table, key))
        if value is not None:
            self._not_whole()
        for name in (path, path + _UNFINISHED):
            with suppress(FileNotFoundError):
                os.unlink(name)
        self._left.discard((table, key))

    def _read(self, table: str, path: str) -> tuple[str, bytes]:
        """Key and value of a file. Raises OSError, and ValueError if it has no key, or another one than its name."""
        with open(path, "rb") as f:
            head, _, value = f.read().partition(b"\n")
        key = head.decode()
        if self.path(table, key) != path:
            raise ValueError("it has the key of another record")
        return key, value

    def _not_whole(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, _WHOLE))

    def path(self, table: str, key: str) -> str:
        """The file of a record."""
        name = quote(key, safe="")
        if len(name) > _MAX_NAME:
            name = hashlib.sha256(key.encode()).hexdigest()
        return os.path.join(self._directory, table, name)


def _write(path: str, content: bytes) -> None:
    fd = os.open(path + _UNFINISHED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    # Not os.write, which may write a part only, as where the directory is nearly full.
    with open(fd, "wb") as f:
        f.write(content)
    os.rename(path + _UNFINISHED, path)
