"""The node's memory: one SQLite database with a table per kind of record.

A record is opaque bytes under a key; what is in them belongs to the room that wrote them. Calls are
synchronous and take well under a millisecond, so a state change in memory and its row are one step of the
event loop with nothing in between.
"""

from __future__ import annotations

from criserver.store.database import Store

__all__ = ["Store"]
