"""All statistics of a node, as its operations and its API hold them."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.stats.cgroup import Cgroups
from criserver.stats.disk import DiskMeter
from criserver.stats.network import Networks


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is kept between calls: descriptors of cgroups and network namespaces, and sizes of writable layers."""

    cgroups: Cgroups
    networks: Networks
    disk: DiskMeter

    def close(self) -> None:
        """Close all descriptors."""
        self.cgroups.close()
        self.networks.close()
