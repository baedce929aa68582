"""Statistics of cgroups, network namespaces and writable layers, and the metrics made of them.

This room knows paths and keys only: what a pod or a container is, is its callers' business.
"""

from criserver.stats.cgroup import CgroupReader, Cgroups, Cpu, Details, Memory, Swap, Usage
from criserver.stats.disk import DiskMeter, DiskUsage
from criserver.stats.metrics import LABELS, METRICS, FileSystem, Limits, Metric, Subject, device_name, samples
from criserver.stats.network import Networks
from criserver.stats.parse import DeviceIo, Interface, Pressure, Stall
from criserver.stats.processes import Descriptors, survey
from criserver.stats.statistics import Statistics

__all__ = [
    "LABELS",
    "METRICS",
    "CgroupReader",
    "Cgroups",
    "Cpu",
    "Descriptors",
    "Details",
    "DeviceIo",
    "DiskMeter",
    "DiskUsage",
    "FileSystem",
    "Interface",
    "Limits",
    "Memory",
    "Metric",
    "Networks",
    "Pressure",
    "Stall",
    "Statistics",
    "Subject",
    "Swap",
    "Usage",
    "device_name",
    "samples",
    "survey",
]
