"""The SQLite database: schema, migrations, transactions.

The database has a write-ahead log with ``synchronous=NORMAL``:

1. A commit is a write to the page cache, without fsync. It survives a SIGKILL of the daemon.
2. A power cut may lose the last commits. It ends every container too, and the start clears what no record owns.
3. :meth:`Store.checkpoint` writes the log into the database. Its fsync runs in a thread, never within a commit.

One thread makes all writes, in the order in which they are submitted. A disk that stands still holds up the calls that
wait for a write, and no others.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from criserver.errors import CriError, ResourceExhaustedError
from criserver.store.mirror import Mirror
from criserver.telemetry import operations
from snapshotter.tasks import outlive
from snapshotter.threads import Threads

log = structlog.get_logger(__name__)

# Seconds. No other process writes.
_LOCK_TIMEOUT = 5.0
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


# What an operator can do with what this release cannot read.
WRITTEN_BY_NEWER = (
    "a newer criserver wrote it; start that one again. To go back to this one, first take the node's pods down with "
    "the newer one's `criserver reset --images`: only that one can undo their networks"
)


class Change(NamedTuple):
    """A record that is to be written in place of the key's last one; ``value`` None deletes it."""

    table: str
    key: str
    value: bytes | None


class Store:
    """Records by table and key.

    They have a second copy below the directory ``mirror``. Where the two differ, that is the newer one. Raises
    :class:`CriError` if the database cannot be opened, is damaged or was written by a newer criserver.
    """

    def __init__(self, path: str, mirror: str = "") -> None:
        self._path = path
        # For root alone, as records hold environment variables. SQLite gives the log the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=_LOCK_TIMEOUT, check_same_thread=False)
            self._check()
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            self._migrate()
            self._reserve()
        except sqlite3.Error as e:
            raise CriError(
                f"database {path}: {e}; move it away: a new one takes the records of this boot from {mirror}"
            ) from e
        self._mirror = Mirror(mirror, TABLES - {"meta"}) if mirror else None
        self._take_from_mirror()
        self._thread = Threads(1, "database")

    def _check(self) -> None:
        """Raises sqlite3.DatabaseError for a damaged file. Takes a few milliseconds for a node's records."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({found.splitlines()[-1]})")

    def _take_from_mirror(self) -> None:
        """Write into the database what its second copy has and the database has lost, and the other way round."""
        if self._mirror is None:
            return
        self._mirror.finish()
        known = {(table, key): value for table in TABLES - {"meta"} for key, value in self.items(table)}
        copies = {(table, key): value for table, key, value in self._mirror.items(known)}
        changes = [Change(*where, value) for where, value in copies.items() if known.get(where) != value]
        if self._mirror.is_whole:
            changes += [Change(*where, None) for where in known.keys() - copies.keys()]
        else:
            for where in known.keys() - copies.keys():
                self._mirror.put(*where, known[where])
            self._mirror.mark_whole()
        if changes:
            log.warning("the database is not the last one; records are taken from their copy", records=len(changes))
            self._commit(changes)

    def _migrate(self) -> None:
        version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            raise CriError(
                f"database {self._path} has schema version {version}, and this criserver knows "
                f"{len(_MIGRATIONS)} at most: {WRITTEN_BY_NEWER}"
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
        """The record under ``key``, or None. It blocks, so it is for the time before the daemon serves."""
        row = self._db.execute(f"SELECT value FROM {_name(table)} WHERE key = ?", (key,)).fetchone()  # noqa: S608 - a name of TABLES
        return row[0] if row else None

    def items(self, table: str) -> list[tuple[str, bytes]]:
        """All records of a table, ordered by key. It blocks as :meth:`get` does."""
        return self._db.execute(f"SELECT key, value FROM {_name(table)} ORDER BY key").fetchall()  # noqa: S608 - a name of TABLES

    async def write(self, *changes: Change) -> None:
        """Make changes in one transaction; they are made also if the caller is cancelled.

        Raises ResourceExhaustedError if the disk is full. Nothing has changed then.
        """
        with operations.WRITE.timed():
            await outlive(self.submit(*changes))

    def submit(self, *changes: Change) -> asyncio.Future[None]:
        """As :meth:`write`, and returns at once. Changes are made in the order of these calls."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self.write_now, *changes)

    def write_now(self, *changes: Change) -> None:
        """As :meth:`write`, and blocks until it is done."""
        with operations.TRANSACTION.timed():
            self._write_both(changes)

    def _write_both(self, changes: Sequence[Change]) -> None:
        mirror = self._mirror
        if mirror is None:
            self._commit(changes)
            return
        mirror.agree(self.get)
        with mirror.together(changes):
            try:
                for table, key, value in changes:
                    if value is not None:
                        mirror.put(table, key, value)
                self._commit(changes)
            except (OSError, ResourceExhaustedError):
                mirror.agree(self.get, *((table, key) for table, key, _ in changes))
                raise
            for table, key, value in changes:
                if value is None:
                    mirror.put(table, key, None)

    def _commit(self, changes: Sequence[Change]) -> None:
        try:
            sys.audit("criserver.commit", changes)
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for table, key, value in changes:
                    if value is None:
                        self._db.execute(f"DELETE FROM {_name(table)} WHERE key = ?", (key,))  # noqa: S608 - a name of TABLES
                    else:
                        self._db.execute(f"INSERT OR REPLACE INTO {_name(table)} VALUES (?, ?)", (key, value))  # noqa: S608 - a name of TABLES
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as e:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise ResourceExhaustedError(f"database {self._path} cannot be written: {e}; is its disk full?") from e

    async def checkpoint(self) -> None:
        """Write the write-ahead log into the database, in a thread, with a connection of its own. Raises CriError.

        Copies that an earlier error has left are corrected before.
        """
        if self._mirror is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._mirror.agree, self.get)

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
        """Make the changes that were submitted, and close the database. SQLite then writes the log into it."""
        self._thread.shutdown()
        self._db.close()


def _name(table: str) -> str:
    if table not in TABLES:
        raise KeyError(table)
    return table
