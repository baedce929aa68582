"""The metrics of cAdvisor, as a table: an entry has the name, help text, labels and values of one metric.

The values and the descriptor of a metric are in one entry, so they always fit together. Values are whole numbers, as
CRI's field is: times are in whole seconds. The common labels mean the same as in cAdvisor: ``id`` is the cgroup,
``name`` is the container's ID, and ``container`` is empty for a value of the pod.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from criserver.stats.cgroup_values import CgroupDetails, CgroupUsage, HugePages
from criserver.stats.descriptors import Descriptors
from criserver.stats.disk import DiskUsage
from criserver.stats.kernel_text import DeviceIo, InterfaceCounters, Pressure

LABELS = ("pod", "namespace", "container", "id", "image", "name")

_SECOND_NS = 1_000_000_000
# The kernel's defaults, for a container without these values.
_CPU_PERIOD = 100_000
_CPU_SHARES = 1024


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """The limits of a container (CRI LinuxContainerResources); 0 means no limit."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory: int = 0
    swap: int = 0


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system of the writable layers: its device, and its size in bytes and inodes."""

    device: str
    size: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, slots=True)
class Measurements:
    """All measurements of a container or pod for its metrics; None or empty where it has no such thing.

    ``started_at`` is in Unix nanoseconds.
    """

    usage: CgroupUsage
    details: CgroupDetails
    processes: int
    descriptors: Descriptors | None = None
    interfaces: tuple[InterfaceCounters, ...] = ()
    disk: DiskUsage | None = None
    file_system: FileSystem | None = None
    limits: ContainerLimits | None = None
    started_at: int = 0


# A value, None where it is unknown, and the values of the metric's own labels.
_Row = tuple[int | None, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's descriptor; ``labels`` are its own ones, behind :data:`LABELS`."""

    name: str
    help: str
    counter: bool
    labels: tuple[str, ...]
    rows: Callable[[Measurements], Iterable[_Row]]


def samples(measured: Measurements) -> Iterator[tuple[Metric, int, tuple[str, ...]]]:
    """The known values of each metric, with the values of its own labels."""
    for metric in METRICS:
        for value, labels in metric.rows(measured):
            if value is not None:
                yield metric, value, labels


def _counter(name: str, help_text: str, value: Callable[[Measurements], int | None]) -> Metric:
    return Metric(name, help_text, True, (), lambda of: ((value(of), ()),))


def _gauge(name: str, help_text: str, value: Callable[[Measurements], int | None]) -> Metric:
    return Metric(name, help_text, False, (), lambda of: ((value(of), ()),))


def _seconds(nanoseconds: int | None) -> int | None:
    return None if nanoseconds is None else nanoseconds // _SECOND_NS


def _pressure(resource: str, awaited: str, value: Callable[[Measurements], Pressure | None]) -> tuple[Metric, Metric]:
    """cAdvisor's "waiting" is "some" in PSI, and its "stalled" is "full"."""

    def waiting(of: Measurements) -> int | None:
        pressure = value(of)
        return _seconds(pressure.some.total_ns) if pressure and pressure.some else None

    def stalled(of: Measurements) -> int | None:
        pressure = value(of)
        return _seconds(pressure.full.total_ns) if pressure and pressure.full else None

    prefix = f"container_pressure_{resource}"
    return (
        _counter(
            f"{prefix}_waiting_seconds_total", f"Time for which a task waited for {awaited}, in seconds.", waiting
        ),
        _counter(
            f"{prefix}_stalled_seconds_total", f"Time for which all tasks waited for {awaited}, in seconds.", stalled
        ),
    )


def _io(name: str, help_text: str, value: Callable[[DeviceIo], int]) -> Metric:
    def rows(of: Measurements) -> Iterable[_Row]:
        return ((value(io), (device_name(io.major, io.minor),)) for io in of.details.io)

    return Metric(name, help_text, True, ("device",), rows)


def _blkio(of: Measurements) -> Iterable[_Row]:
    for io in of.details.io:
        device = (device_name(io.major, io.minor), str(io.major), str(io.minor))
        yield io.read_bytes, (*device, "Read")
        yield io.write_bytes, (*device, "Write")


def _fs(name: str, help_text: str, value: Callable[[FileSystem, Measurements], int | None]) -> Metric:
    def rows(of: Measurements) -> Iterable[_Row]:
        return () if of.file_system is None else ((value(of.file_system, of), (of.file_system.device,)),)

    return Metric(name, help_text, False, ("device",), rows)


def _huge(name: str, help_text: str, value: Callable[[HugePages], int | None]) -> Metric:
    return Metric(
        name, help_text, False, ("pagesize",), lambda of: ((value(h), (h.size,)) for h in of.details.huge_pages)
    )


def _network(name: str, help_text: str, value: Callable[[InterfaceCounters], int]) -> Metric:
    return Metric(name, help_text, True, ("interface",), lambda of: ((value(i), (i.name,)) for i in of.interfaces))


def _spec(name: str, help_text: str, value: Callable[[ContainerLimits], int | None]) -> Metric:
    return _gauge(name, help_text, lambda of: None if of.limits is None else value(of.limits))


def _zero(of: Measurements) -> int | None:
    """0 for what the kernel does not count, if it tells of the memory at all."""
    return None if of.usage.memory is None else 0


def _faults(of: Measurements) -> Iterable[_Row]:
    for scope, counts in (("container", of.details.faults), ("hierarchy", of.details.hierarchy_faults)):
        for kind, count in zip(("pgfault", "pgmajfault"), counts, strict=True):
            yield count, (kind, scope)


def device_name(major: int, minor: int) -> str:
    """The name of a block device, such as /dev/sda; its numbers, such as 8:0, where it has no name."""
    try:
        return "/dev/" + os.path.basename(os.readlink(f"/sys/dev/block/{major}:{minor}"))
    except OSError:
        return f"{major}:{minor}"


METRICS = (
    _gauge("container_last_seen", "When it was last seen, in Unix seconds.", lambda s: _seconds(s.usage.timestamp)),
    _gauge(
        "container_start_time_seconds",
        "When its first process was started, in Unix seconds.",
        lambda s: _seconds(s.started_at) or None,
    ),
    # CPU.
    Metric(
        "container_cpu_usage_seconds_total",
        "CPU time used on all processors together, in seconds.",
        True,
        ("cpu",),
        lambda s: ((_seconds(s.usage.cpu.total_ns) if s.usage.cpu else None, ("total",)),),
    ),
    _counter(
        "container_cpu_user_seconds_total",
        "CPU time used in user mode, in seconds.",
        lambda s: _seconds(s.details.cpu_user_ns),
    ),
    _counter(
        "container_cpu_system_seconds_total",
        "CPU time used in the kernel, in seconds.",
        lambda s: _seconds(s.details.cpu_system_ns),
    ),
    _counter(
        "container_cpu_cfs_periods_total",
        "Periods of the CPU quota in which it was runnable.",
        lambda s: s.details.periods,
    ),
    _counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which it ran out of its CPU quota.",
        lambda s: s.details.throttled_periods,
    ),
    _counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time for which it was kept waiting after its CPU quota ran out, in seconds.",
        lambda s: _seconds(s.details.throttled_ns),
    ),
    # Memory.
    _gauge(
        "container_memory_usage_bytes",
        "Memory in use, page cache included, in bytes.",
        lambda s: s.usage.memory.usage if s.usage.memory else None,
    ),
    _gauge(
        "container_memory_working_set_bytes",
        "Memory in use without inactive page cache, in bytes: what counts against eviction.",
        lambda s: s.usage.memory.working_set if s.usage.memory else None,
    ),
    _gauge(
        "container_memory_rss",
        "Anonymous memory, in bytes.",
        lambda s: s.usage.memory.rss if s.usage.memory else None,
    ),
    _gauge("container_memory_cache", "Page cache, in bytes.", lambda s: s.details.cache),
    _gauge(
        "container_memory_kernel_usage", "Memory that the kernel uses for it, in bytes.", lambda s: s.details.kernel
    ),
    _gauge("container_memory_mapped_file", "Files mapped into memory, in bytes.", lambda s: s.details.mapped_file),
    _gauge(
        "container_memory_swap",
        "Swap space in use, in bytes; 0 where the node does not count it.",
        lambda s: s.usage.swap.usage if s.usage.swap else _zero(s),
    ),
    _gauge(
        "container_memory_total_active_file_bytes",
        "Active page cache, in bytes.",
        lambda s: s.details.active_file,
    ),
    _gauge(
        "container_memory_total_inactive_file_bytes",
        "Inactive page cache, in bytes.",
        lambda s: s.details.inactive_file,
    ),
    _gauge(
        "container_memory_max_usage_bytes",
        "The most memory ever in use, in bytes; 0 on cgroup version 2 before Linux 5.19.",
        lambda s: s.details.max_usage or _zero(s),
    ),
    _counter("container_memory_failcnt", "Times that its memory use met the limit.", lambda s: s.details.limit_hits),
    Metric(
        "container_memory_failures_total",
        "Page faults (pgfault) and those that had to wait for a disk (pgmajfault).",
        True,
        ("failure_type", "scope"),
        _faults,
    ),
    _counter(
        "container_oom_events_total",
        "Processes that the kernel killed because its memory ran out.",
        lambda s: s.details.oom_kills,
    ),
    _huge("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", lambda h: h.usage),
    _huge("container_hugetlb_max_usage_bytes", "The most huge pages ever in use, in bytes.", lambda h: h.max_usage),
    # Processes.
    _gauge("container_processes", "Processes.", lambda s: s.processes),
    _gauge("container_threads", "Threads of all its processes.", lambda s: s.details.threads),
    _gauge(
        "container_threads_max",
        "The most threads that it may have; 0 without a limit.",
        lambda s: None if s.details.threads is None else s.details.threads_max or 0,
    ),
    _gauge(
        "container_file_descriptors",
        "Open file descriptors of all its processes.",
        lambda s: s.descriptors.open if s.descriptors else None,
    ),
    _gauge(
        "container_sockets",
        "Open sockets of all its processes.",
        lambda s: s.descriptors.sockets if s.descriptors else None,
    ),
    Metric(
        "container_ulimits_soft",
        "Soft resource limits of its first process; one without a limit has no value.",
        False,
        ("ulimit",),
        lambda s: ((s.descriptors.limit if s.descriptors else None, ("max_open_files",)),),
    ),
    # Disks.
    _fs(
        "container_fs_usage_bytes",
        "Disk usage of its writable layer, in bytes.",
        lambda _, s: s.disk.bytes if s.disk else None,
    ),
    _fs(
        "container_fs_limit_bytes",
        "The size of the file system with its writable layer, in bytes.",
        lambda fs, _: fs.size,
    ),
    _fs("container_fs_inodes_total", "All inodes of the file system with its writable layer.", lambda fs, _: fs.inodes),
    _fs("container_fs_inodes_free", "The inodes still free there.", lambda fs, _: fs.inodes_free),
    _io("container_fs_reads_total", "Reads from a device.", lambda io: io.reads),
    _io("container_fs_reads_bytes_total", "Bytes read from a device.", lambda io: io.read_bytes),
    _io("container_fs_writes_total", "Writes to a device.", lambda io: io.writes),
    _io("container_fs_writes_bytes_total", "Bytes written to a device.", lambda io: io.write_bytes),
    Metric(
        "container_blkio_device_usage_total",
        "Bytes read from and written to a device.",
        True,
        ("device", "major", "minor", "operation"),
        _blkio,
    ),
    # The network.
    _network("container_network_receive_bytes_total", "Bytes received.", lambda i: i.rx_bytes),
    _network("container_network_receive_packets_total", "Packets received.", lambda i: i.rx_packets),
    _network("container_network_receive_packets_dropped_total", "Received packets dropped.", lambda i: i.rx_dropped),
    _network("container_network_receive_errors_total", "Errors in receiving.", lambda i: i.rx_errors),
    _network("container_network_transmit_bytes_total", "Bytes sent.", lambda i: i.tx_bytes),
    _network("container_network_transmit_packets_total", "Packets sent.", lambda i: i.tx_packets),
    _network("container_network_transmit_packets_dropped_total", "Packets to send dropped.", lambda i: i.tx_dropped),
    _network("container_network_transmit_errors_total", "Errors in sending.", lambda i: i.tx_errors),
    # Its limits.
    _spec("container_spec_cpu_period", "The period of its CPU quota, in us.", lambda of: of.cpu_period or _CPU_PERIOD),
    _spec("container_spec_cpu_quota", "Its CPU quota, in us a period.", lambda of: max(of.cpu_quota, 0) or None),
    _spec("container_spec_cpu_shares", "Its weight when processors are busy.", lambda of: of.cpu_shares or _CPU_SHARES),
    _spec(
        "container_spec_memory_limit_bytes", "Its memory limit, in bytes; 0 without one.", lambda of: max(of.memory, 0)
    ),
    _spec(
        "container_spec_memory_reservation_limit_bytes",
        "Its memory reservation, in bytes; always 0, because CRI has none.",
        lambda _: 0,
    ),
    _spec(
        "container_spec_memory_swap_limit_bytes",
        "Its limit of memory and swap together, in bytes; 0 without one.",
        lambda of: max(of.swap, 0),
    ),
    # Pressure.
    *_pressure("cpu", "a processor", lambda s: s.usage.cpu_pressure),
    *_pressure("memory", "memory", lambda s: s.usage.memory_pressure),
    *_pressure("io", "a disk", lambda s: s.usage.io_pressure),
)
