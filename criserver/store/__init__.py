"""The records of the daemon: one SQLite database with a table for each kind of record.

A record is bytes under a key; the room that writes them defines the content. Calls are synchronous and take well
under a millisecond. So a change in memory and its row are one step of the event loop, and no other task runs in
between.
"""

from __future__ import annotations

from criserver.store.database import Store

__all__ = ["Store"]
