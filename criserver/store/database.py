"""The SQLite database: schema, migrations, transactions.

Write-ahead log with ``synchronous=NORMAL``: a commit is a write to the page cache, so it survives a SIGKILL
of the daemon, and costs no fsync. A power cut may take the last commits with it, but it takes every
container too, and start-up clears what no record owns. The log is folded into the database by
``checkpoint``, whose fsync runs in a thread, never within a commit.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from criserver.errors import CriError, ResourceExhaustedError

# Seconds. Nobody else writes; what waits here holds up the whole event loop.
_LOCK_TIMEOUT = 0.2
_RESERVE = 1 << 20
_PIECE = 32 << 10

TABLES = frozenset({"meta", "sandboxes", "containers", "images", "image_names"})

# Each entry brings a database from version N (its index) to N + 1; entries are never edited once released.
_MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE sandboxes (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE containers (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE images (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE image_names (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    """,
)


class Store:
    """Records by table and key.

    Raises :class:`CriError` where the database cannot be opened or was written by a newer criserver.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # For root alone: records hold environment variables. The log beside it takes its mode over.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=_LOCK_TIMEOUT)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            self._migrate()
            self._reserve()
        except sqlite3.Error as e:
            raise CriError(f"database {path}: {e}; move it away to start with an empty one") from e

    def _migrate(self) -> None:
        version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            raise CriError(
                f"database {self._path} has schema version {version}, and this criserver knows "
                f"{len(_MIGRATIONS)} at most: it was written by a newer criserver; install that one again, "
                "or move it away and take all pods of the node down with `criserver reset`"
            )
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")

    def _reserve(self) -> None:
        """Have room for the next writes in the database and, from the next checkpoint on, in its log.

        Without it nothing could be removed any more from a disk that is full. Where it is full already, there is
        what there is.
        """
        # In pieces, and without a cache for them: the daemon would keep the memory that all of it takes at once.
        self._db.execute("PRAGMA cache_size=-64")
        try:
            for number in range(_RESERVE // _PIECE):
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, zeroblob(?))", (f"reserve{number}", _PIECE))
            self._db.execute("DELETE FROM meta WHERE key GLOB 'reserve*'")
        except sqlite3.OperationalError:
            pass
        finally:
            self._db.execute("PRAGMA cache_size=-2000")  # SQLite's own default

    def get(self, table: str, key: str) -> bytes | None:
        """The record under ``key``, or None."""
        row = self._db.execute(f"SELECT value FROM {_name(table)} WHERE key = ?", (key,)).fetchone()  # noqa: S608 - a name of TABLES
        return row[0] if row else None

    def items(self, table: str) -> list[tuple[str, bytes]]:
        """All records of a table, ordered by key."""
        return self._db.execute(f"SELECT key, value FROM {_name(table)} ORDER BY key").fetchall()  # noqa: S608 - a name of TABLES

    def put(self, table: str, key: str, value: bytes) -> None:
        """Write a record, replacing what the key had. Raises ResourceExhaustedError where the disk takes no more."""
        self._write(f"INSERT OR REPLACE INTO {_name(table)} VALUES (?, ?)", key, value)  # noqa: S608 - a name of TABLES

    def delete(self, table: str, key: str) -> None:
        """Remove a record; one that is not there is no error. Raises as :meth:`put` does."""
        self._write(f"DELETE FROM {_name(table)} WHERE key = ?", key)  # noqa: S608 - a name of TABLES

    def _write(self, statement: str, *values: str | bytes) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as e:
            raise ResourceExhaustedError(f"database {self._path} cannot be written: {e}; is its disk full?") from e

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes within take effect together, or none where the block raises. Does not nest."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    async def checkpoint(self) -> None:
        """Fold the write-ahead log into the database, by a connection of its own in a thread, in nobody's way.

        Raises CriError.
        """

        def run() -> None:
            db = sqlite3.connect(self._path)
            try:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            finally:
                db.close()

        try:
            await asyncio.to_thread(run)
        except sqlite3.Error as e:
            raise CriError(f"database {self._path}: checkpoint: {e}") from e

    def close(self) -> None:
        """Close the database; SQLite folds the log in as the last connection goes."""
        self._db.close()


def _name(table: str) -> str:
    if table not in TABLES:
        raise KeyError(table)
    return table
