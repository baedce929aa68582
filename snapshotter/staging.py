"""The directory of whatever is being made or deleted, and of mounts that are needed for a moment.

A layer or snapshot is renamed out of it when it is whole, and into it when it is removed. What an earlier process has
left in it is deleted at the start.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile

import structlog

from snapshotter import mounts, removal
from snapshotter.errors import SnapshotError
from snapshotter.metadata import KEY

log = structlog.get_logger(__name__)

_REMOVED = re.compile(rf"removed-[0-9a-f]{{16}}-({KEY.pattern})")


class Staging:
    """The directory ``path``, which no other process changes. Methods raise OSError where they do not say otherwise."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._undeleted: set[str] = set()

    def sweep(self) -> dict[str, str]:
        """Unmount and delete all that is here. Returns the names of removed snapshots that are still here, by key."""
        # First the mounts: a deletion must not go into what is mounted.
        for point in mounts.mounts_below(self.path):
            try:
                mounts.unmount(point)
            except OSError as e:
                log.warning("a mount in staging cannot be unmounted", error=f"cannot unmount {point}: {e.strerror}")
        left = {}
        for name in os.listdir(self.path):
            if not self.discard(name) and (key := _REMOVED.fullmatch(name)):
                left[key[1]] = name
        return left

    def new(self) -> str:
        """The path of a new empty directory."""
        return tempfile.mkdtemp(dir=self.path)

    def place(self) -> str:
        """The path of a directory that is not there yet; :meth:`make` makes it."""
        return os.path.join(self.path, f"new-{secrets.token_hex(8)}")

    def make(self, area: str) -> None:
        """Make the directory of a new layer, with the root of its files. What is made before an error stays."""
        os.mkdir(area, 0o700)
        self.new_root(area, 0, 0, 0o755)

    def new_root(self, area: str, uid: int, gid: int, mode: int) -> None:
        """Make the directory ``fs`` in ``area``: the root of a layer or snapshot."""
        path = os.path.join(area, "fs")
        os.mkdir(path, 0o700)
        os.chown(path, uid, gid)
        os.chmod(path, mode)

    def removed_name(self, key: str = "") -> str:
        """A new name here for a layer, or for the snapshot ``key``, that is to be deleted."""
        return f"removed-{secrets.token_hex(8)}" + (f"-{key}" if key else "")

    def retire(self, path: str, name: str) -> None:
        """Move a layer or snapshot here, to be deleted under ``name``; it may be gone already. Raises SnapshotError.

        It makes no directory, as there may be no space left on the file system.
        """
        try:
            os.rename(path, os.path.join(self.path, name))
        except OSError as e:
            if os.path.lexists(path):
                raise SnapshotError(f"{path} cannot be removed: {e}") from e

    def delete(self, name: str) -> None:
        """Delete ``name`` here. Raises SnapshotError; :meth:`delete_rest` and the next start try again."""
        path = os.path.join(self.path, name)
        try:
            removal.remove_path(path)
        except OSError as e:
            self._undeleted.add(name)
            raise SnapshotError(f"{path} cannot be deleted: {e}") from e
        self._undeleted.discard(name)

    def delete_rest(self) -> None:
        """Try the deletions again that have failed. One that fails again is logged."""
        for name in tuple(self._undeleted):
            self.discard(name)

    def discard(self, area: str) -> bool:
        """Delete ``area``, a name or a path here. Returns False, and logs the reason, if it cannot be deleted.

        :meth:`delete_rest` and the next start try again then.
        """
        try:
            self.delete(os.path.basename(area))
        except SnapshotError as e:
            log.warning("a deletion in staging failed", error=str(e))
            return False
        return True
