"""The readers of all cgroups of the node, and how many of their files stay open."""

from __future__ import annotations

import resource
from collections.abc import Collection, Mapping

from criserver.stats.cgroup_files import DescriptorBudget
from criserver.stats.cgroup_reader import CgroupReader
from criserver.stats.cgroup_v1 import CgroupV1
from criserver.stats.cgroup_v2 import CgroupV2

# A quarter of the process's descriptors may stay open here: the rest is for calls and shims.
_DESCRIPTOR_SHARE = 4


class CgroupReaders:
    """The readers of cgroups, by path below the hierarchies' roots. A reader is made when it is first needed."""

    def __init__(self, roots: Mapping[str, str]) -> None:
        """``roots`` are the mount points of the hierarchies by controller; the key of the unified one is ""."""
        self._roots = roots
        self._reader_class = CgroupV1 if roots.keys() & {"memory", "cpuacct", "pids"} else CgroupV2
        self._readers: dict[str, CgroupReader] = {}
        self._budget = DescriptorBudget(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTOR_SHARE)

    def reader(self, path: str) -> CgroupReader:
        """The reader of a cgroup. The cgroup need not exist."""
        reader = self._readers.get(path)
        if reader is None:
            reader = self._readers[path] = self._reader_class(self._roots, path, self._budget)
        return reader

    def retain(self, paths: Collection[str]) -> None:
        """Close the readers of all cgroups but these."""
        for path in self._readers.keys() - paths:
            self._readers.pop(path).close()

    def close(self) -> None:
        """Close all readers."""
        self.retain(())
