"""All sources of statistics of a node."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.stats.cgroup_readers import CgroupReaders
from criserver.stats.disk import DiskMeter
from criserver.stats.network_counters import NetworkCounters


@dataclass(frozen=True, slots=True)
class Statistics:
    """The state between calls: descriptors of cgroups and network namespaces, and sizes of writable layers."""

    cgroups: CgroupReaders
    networks: NetworkCounters
    disk: DiskMeter

    def close(self) -> None:
        """Close all descriptors."""
        self.cgroups.close()
        self.networks.close()
