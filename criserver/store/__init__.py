"""The records of the daemon: one SQLite database with a table for each kind of record.

A record is bytes under a key; the room that writes them defines the content. Reads are for the start, when all records
are taken into memory. Writes go to a thread, so that the event loop never waits for a disk.
"""

from __future__ import annotations

from criserver.store.database import WRITTEN_BY_NEWER, Change, Store

__all__ = ["WRITTEN_BY_NEWER", "Change", "Store"]
