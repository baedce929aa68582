"""The values of a cgroup: CRI's statistics, and what metrics need beside them."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.stats.kernel_text import DeviceIo, Pressure


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time in nanoseconds. ``rate`` is in nanocores since an earlier reading, None at the first one."""

    total_ns: int
    rate: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, and counts of faults. ``working_set`` is the usage without inactive page cache, as for the kubelet.

    ``rss`` is anonymous memory, and ``shmem`` that of tmpfs and shared memory. The kernel can free both only by
    swapping them out.
    """

    usage: int
    limit: int | None
    working_set: int
    rss: int | None
    page_faults: int | None
    major_page_faults: int | None
    shmem: int | None = None

    @property
    def available(self) -> int | None:
        """The bytes up to the limit; None without a limit."""
        return None if self.limit is None else max(self.limit - self.working_set, 0)


@dataclass(frozen=True, slots=True)
class Swap:
    """Bytes."""

    usage: int
    limit: int | None

    @property
    def available(self) -> int | None:
        """The bytes up to the limit; None without a limit."""
        return None if self.limit is None else max(self.limit - self.usage, 0)


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """The values of a cgroup for CRI's statistics, at ``timestamp`` (Unix nanoseconds)."""

    timestamp: int
    cpu: Cpu | None
    memory: Memory | None
    swap: Swap | None
    cpu_pressure: Pressure | None
    memory_pressure: Pressure | None
    io_pressure: Pressure | None


@dataclass(frozen=True, slots=True)
class HugePages:
    """Bytes in pages of ``size``, as the controller writes the size ("2MB")."""

    size: str
    usage: int
    max_usage: int | None


@dataclass(frozen=True, slots=True)
class CgroupDetails:
    """The values of a cgroup for metrics alone.

    ``faults`` is without the cgroups below, ``hierarchy_faults`` with them. Each is a pair: all page faults, and the
    major ones. ``threads`` counts tasks; :meth:`CgroupReader.processes` has the processes.
    """

    cpu_user_ns: int | None
    cpu_system_ns: int | None
    periods: int | None
    throttled_periods: int | None
    throttled_ns: int | None
    cache: int | None
    kernel: int | None
    mapped_file: int | None
    active_file: int | None
    inactive_file: int | None
    max_usage: int | None
    limit_hits: int | None
    oom_kills: int | None
    faults: tuple[int | None, int | None]
    hierarchy_faults: tuple[int | None, int | None]
    threads: int | None
    threads_max: int | None
    io: tuple[DeviceIo, ...]
    huge_pages: tuple[HugePages, ...]
