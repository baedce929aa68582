"""The node as the checks see it: its files, its mounts, and the tries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from criserver.check import tries
from criserver.config import Config, RuntimeHandler
from criserver.runtime import selinux
from snapshotter.mounts import MountEntry, entries


@dataclass(frozen=True, slots=True)
class ExaminedNode:
    """Files below ``root``, which is "/" on a node, and the tries. A try returns None, or the reason why it failed.

    ``privileged`` says whether the tries may run: they need root.
    """

    root: str = "/"
    privileged: bool = True
    user: Callable[[], int] = os.geteuid
    which: Callable[[str], str | None] = shutil.which
    overlay: Callable[[str], str | None] = tries.overlay
    idmap: Callable[[str], str | None] = tries.idmap
    link: Callable[[str], str | None] = tries.link
    iptables: Callable[[str], str | None] = tries.iptables
    calls: Callable[[], list[str]] = tries.missing_calls
    version: Callable[[str], str | None] = tries.version
    plugin_version: Callable[[str], str | None] = tries.plugin_version
    network: Callable[[Config], str | None] = tries.network
    features: Callable[[RuntimeHandler], tuple[str, ...] | None] = tries.features
    container: Callable[[Config, str], str | None] = tries.container
    labelled: Callable[[], bool] = selinux.labels_containers
    synchronised: Callable[[], bool] = tries.clock_is_synchronised

    def path(self, path: str) -> str:
        """The path of a file of the host."""
        return os.path.join(self.root, path.lstrip("/"))

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return os.path.exists(self.path(path))

    def read(self, path: str) -> str | None:
        """A file's text without the space around it; None if the file does not exist or cannot be read."""
        try:
            with open(self.path(path), errors="surrogateescape") as f:
                return f.read().strip()
        except OSError:
            return None

    def mounts(self) -> list[MountEntry]:
        """The host's mounts, in the order in which they were made; none if the list cannot be read."""
        try:
            return list(entries(self.path("/proc/self/mountinfo")))
        except OSError:
            return []

    def mount_of(self, path: str) -> MountEntry | None:
        """The mount that contains a real path: the last one that was made at the longest mount point."""
        best: MountEntry | None = None
        for mount in self.mounts():
            inside = mount.point == "/" or path == mount.point or path.startswith(mount.point + "/")
            if inside and (best is None or len(mount.point) >= len(best.point)):
                best = mount
        return best

    def nearest(self, path: str) -> str:
        """The path, or the nearest directory above it that exists."""
        while not self.exists(path) and path != "/":
            path = os.path.dirname(path)
        return path
