"""Statistics of cgroups, network namespaces and writable layers, and the metrics made of them.

This room knows only paths and keys. Its callers know the pods and containers behind them.
"""

from criserver.stats.cgroup_readers import CgroupReaders
from criserver.stats.cgroup_values import CgroupUsage, Cpu, Memory, Swap
from criserver.stats.descriptors import Descriptors, count_descriptors
from criserver.stats.disk import DiskMeter, DiskUsage
from criserver.stats.kernel_text import InterfaceCounters, Pressure, Stall
from criserver.stats.metrics import (
    LABELS,
    METRICS,
    ContainerLimits,
    FileSystem,
    Measurements,
    Metric,
    device_name,
    samples,
)
from criserver.stats.network_counters import NetworkCounters
from criserver.stats.statistics import Statistics

__all__ = [
    "LABELS",
    "METRICS",
    "CgroupReaders",
    "CgroupUsage",
    "ContainerLimits",
    "Cpu",
    "Descriptors",
    "DiskMeter",
    "DiskUsage",
    "FileSystem",
    "InterfaceCounters",
    "Measurements",
    "Memory",
    "Metric",
    "NetworkCounters",
    "Pressure",
    "Stall",
    "Statistics",
    "Swap",
    "count_descriptors",
    "device_name",
    "samples",
]
