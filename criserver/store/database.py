"""The SQLite database: schema, migrations, transactions.

The database has a write-ahead log with ``synchronous=NORMAL``:

1. A commit is a write to the page cache, without fsync. It survives a SIGKILL of the daemon.
2. A power cut may lose the last commits. It ends every container too, and the start clears what no record owns.
3. :meth:`Store.checkpoint` writes the log into the database. Its fsync runs in a thread, never within a commit.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from criserver.errors import CriError, ResourceExhaustedError

# Seconds. No other process writes; a wait here holds up the whole event loop.
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

    Raises :class:`CriError` if the database cannot be opened or was written by a newer criserver.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # For root alone, as records hold environment variables. SQLite gives the log the same mode.
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
        """Reserve space for the next writes in the database and, from the next checkpoint on, in its log.

        Without it nothing could be removed from a full disk, as a removal writes records. If the disk is full already,
        nothing is reserved.
        """
        # In pieces, and with a small cache: the daemon would keep the memory that one large write takes.
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
        """Write a record in place of the key's last one. Raises ResourceExhaustedError if the disk is full."""
        self._write(f"INSERT OR REPLACE INTO {_name(table)} VALUES (?, ?)", key, value)  # noqa: S608 - a name of TABLES

    def delete(self, table: str, key: str) -> None:
        """Remove a record. It is no error if it is missing. Raises as :meth:`put` does."""
        self._write(f"DELETE FROM {_name(table)} WHERE key = ?", key)  # noqa: S608 - a name of TABLES

    def _write(self, statement: str, *values: str | bytes) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as e:
            raise ResourceExhaustedError(f"database {self._path} cannot be written: {e}; is its disk full?") from e

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes in the block take effect together; if it raises, none does. Transactions do not nest."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    async def checkpoint(self) -> None:
        """Write the write-ahead log into the database, in a thread, with a connection of its own. Raises CriError."""

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
        """Close the database. SQLite writes the log into it when the last connection is closed."""
        self._db.close()


def _name(table: str) -> str:
    if table not in TABLES:
        raise KeyError(table)
    return table
