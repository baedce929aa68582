"""Readers of a cgroup's own files, version 1 or 2, for statistics and metrics.

A file is opened once and read at offset 0 from then on, which is what makes a list of many containers cheap. A
cgroup that is gone, or has no such controller, gives None where a number would be; nothing here raises. Reading
needs no shim and no process of the container.
"""

from __future__ import annotations

import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from criserver.stats import parse
from criserver.stats.parse import DeviceIo, Pressure

# More than any of the files has; what a container can make long (cgroup.procs) is read in pieces.
_FILE_SIZE = 16 << 10
_MAX_PROCESSES_SIZE = 1 << 20
# A privileged container may make cgroups of its own without end.
_MAX_NESTED = 256
# The share of the process's descriptors that may be kept open here: the rest is for calls and shims.
_DESCRIPTOR_SHARE = 4
# Below this the rate of CPU use says more of the clock tick than of the container.
_RATE_INTERVAL_NS = 1_000_000_000
# The unit of cpuacct.stat, USER_HZ, is 100 on every architecture that Linux has user space for.
_TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time in nanoseconds; ``rate`` is in nanocores since an earlier reading, None at the first."""

    total_ns: int
    rate: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, and counts of faults. ``working_set`` is the usage without inactive page cache, as the kubelet counts."""

    usage: int
    limit: int | None
    working_set: int
    rss: int | None
    page_faults: int | None
    major_page_faults: int | None

    @property
    def available(self) -> int | None:
        """What is left up to the limit; None without one."""
        return None if self.limit is None else max(self.limit - self.working_set, 0)


@dataclass(frozen=True, slots=True)
class Swap:
    """Bytes."""

    usage: int
    limit: int | None

    @property
    def available(self) -> int | None:
        """What is left up to the limit; None without one."""
        return None if self.limit is None else max(self.limit - self.usage, 0)


@dataclass(frozen=True, slots=True)
class Usage:
    """What CRI's statistics ask of a cgroup at ``timestamp`` (Unix nanoseconds)."""

    timestamp: int
    cpu: Cpu | None
    memory: Memory | None
    swap: Swap | None
    cpu_pressure: Pressure | None
    memory_pressure: Pressure | None
    io_pressure: Pressure | None


@dataclass(frozen=True, slots=True)
class HugePages:
    """Bytes in pages of ``size``, as the controller writes it ("2MB")."""

    size: str
    usage: int
    max_usage: int | None


@dataclass(frozen=True, slots=True)
class Details:
    """What only metrics ask of a cgroup.

    ``faults`` and ``hierarchy_faults`` are (minor and major, major) without and with the cgroups below. ``threads``
    counts tasks; processes are counted by :meth:`CgroupReader.processes`.
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


class Cgroups:
    """The readers of all cgroups that have been asked after, by path below the hierarchies' roots."""

    def __init__(self, roots: Mapping[str, str]) -> None:
        """``roots`` has each hierarchy's mount point by controller, the unified one's under ""."""
        self._roots = roots
        self._kind = CgroupV1 if roots.keys() & {"memory", "cpuacct", "pids"} else CgroupV2
        self._readers: dict[str, CgroupReader] = {}
        self._budget = _Budget(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTOR_SHARE)

    def reader(self, path: str) -> CgroupReader:
        """The reader of a cgroup, whether it is there or not."""
        reader = self._readers.get(path)
        if reader is None:
            reader = self._readers[path] = self._kind(self._roots, path, self._budget)
        return reader

    def retain(self, paths: Collection[str]) -> None:
        """Close the readers of all cgroups but these."""
        for path in self._readers.keys() - paths:
            self._readers.pop(path).close()

    def close(self) -> None:
        """Close all readers."""
        self.retain(())


class CgroupReader(ABC):
    """Reads one cgroup. What the two versions share is here; where each has its numbers is in the subclasses."""

    def __init__(self, roots: Mapping[str, str], path: str, budget: _Budget) -> None:
        self._files = _Files(budget)
        self._directories = {controller: root + path for controller, root in roots.items()}
        # The base of the next rate: CPU nanoseconds, and the monotonic clock then.
        self._base: tuple[int, int] | None = None
        self._rate: int | None = None

    def usage(self) -> Usage:
        """Read what statistics are made of."""
        timestamp, total = time.time_ns(), self._cpu_ns()
        memory, swap = self._memory()
        return Usage(
            timestamp=timestamp,
            cpu=None if total is None else Cpu(total, self._next_rate(total)),
            memory=memory,
            swap=swap,
            # On hosts of version 1 the unified hierarchy, where mounted beside, has pressure and nothing else.
            cpu_pressure=parse.pressure(self._read("", "cpu.pressure")),
            memory_pressure=parse.pressure(self._read("", "memory.pressure")),
            io_pressure=parse.pressure(self._read("", "io.pressure")),
        )

    @abstractmethod
    def details(self) -> Details:
        """Read what metrics need besides."""

    def processes(self) -> list[int]:
        """The PIDs in this cgroup and those below it.

        They are counted from cgroup.procs, because pids.current counts threads, and what CRI and cAdvisor call
        processes are not threads.
        """
        found: list[int] = []
        pending = [self._process_directory()]
        for _ in range(_MAX_NESTED):
            if not pending:
                break
            directory = pending.pop()
            found += parse.numbers(_read_whole(f"{directory}/cgroup.procs"))
            try:
                with os.scandir(directory) as entries:
                    pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
        return found

    def close(self) -> None:
        """Let go of the descriptors; a later reading opens them again."""
        self._files.close()

    @abstractmethod
    def _cpu_ns(self) -> int | None: ...

    @abstractmethod
    def _memory(self) -> tuple[Memory | None, Swap | None]: ...

    @abstractmethod
    def _process_directory(self) -> str: ...

    def _read(self, controller: str, name: str) -> bytes:
        """A file that every statistics call reads; empty where it is not there."""
        directory = self._directories.get(controller)
        return self._files.read(f"{directory}/{name}") if directory is not None else b""

    def _read_once(self, controller: str, name: str) -> bytes:
        """A file that only metrics read: no descriptor is kept for it."""
        directory = self._directories.get(controller)
        return _read_whole(f"{directory}/{name}") if directory is not None else b""

    def _next_rate(self, total: int) -> int | None:
        """The rate since the last base that is old enough; callers that come quickly share one figure."""
        now = time.monotonic_ns()
        if self._base is None or total < self._base[0]:
            self._base, self._rate = (total, now), None
        elif (interval := now - self._base[1]) >= _RATE_INTERVAL_NS:
            self._rate = (total - self._base[0]) * 1_000_000_000 // interval
            self._base = (total, now)
        return self._rate


class CgroupV1(CgroupReader):
    """A cgroup whose controllers each have a hierarchy."""

    def details(self) -> Details:
        """Read what metrics need besides."""
        ticks = parse.pairs(self._read_once("cpuacct", "cpuacct.stat"))
        cpu = parse.pairs(self._read_once("cpu", "cpu.stat"))
        memory = parse.pairs(self._read("memory", "memory.stat"))
        return Details(
            cpu_user_ns=parse.value(ticks, b"user", _TICK_NS),
            cpu_system_ns=parse.value(ticks, b"system", _TICK_NS),
            periods=parse.value(cpu, b"nr_periods"),
            throttled_periods=parse.value(cpu, b"nr_throttled"),
            throttled_ns=parse.value(cpu, b"throttled_time"),
            cache=parse.value(memory, b"total_cache"),
            kernel=parse.number(self._read_once("memory", "memory.kmem.usage_in_bytes")),
            mapped_file=parse.value(memory, b"total_mapped_file"),
            active_file=parse.value(memory, b"total_active_file"),
            inactive_file=parse.value(memory, b"total_inactive_file"),
            max_usage=parse.number(self._read_once("memory", "memory.max_usage_in_bytes")),
            limit_hits=parse.number(self._read_once("memory", "memory.failcnt")),
            oom_kills=parse.value(parse.pairs(self._read_once("memory", "memory.oom_control")), b"oom_kill"),
            faults=(parse.value(memory, b"pgfault"), parse.value(memory, b"pgmajfault")),
            hierarchy_faults=(parse.value(memory, b"total_pgfault"), parse.value(memory, b"total_pgmajfault")),
            threads=parse.number(self._read_once("pids", "pids.current")),
            threads_max=parse.limit(self._read_once("pids", "pids.max")),
            io=parse.blkio(
                self._read_once("blkio", "blkio.throttle.io_service_bytes_recursive"),
                self._read_once("blkio", "blkio.throttle.io_serviced_recursive"),
            ),
            huge_pages=self._huge_pages(),
        )

    def _cpu_ns(self) -> int | None:
        return parse.number(self._read("cpuacct", "cpuacct.usage"))

    def _memory(self) -> tuple[Memory | None, Swap | None]:
        usage = parse.number(self._read("memory", "memory.usage_in_bytes"))
        if usage is None:
            return None, None
        stat = parse.pairs(self._read("memory", "memory.stat"))
        limit = parse.limit(self._read("memory", "memory.limit_in_bytes"))
        memory = Memory(
            usage=usage,
            limit=limit,
            working_set=max(usage - (parse.value(stat, b"total_inactive_file") or 0), 0),
            rss=parse.value(stat, b"total_rss"),
            page_faults=parse.value(stat, b"total_pgfault"),
            major_page_faults=parse.value(stat, b"total_pgmajfault"),
        )
        swapped = parse.value(stat, b"total_swap")
        if swapped is None:
            return memory, None
        # Its limit is of memory and swap together.
        both = parse.limit(self._read("memory", "memory.memsw.limit_in_bytes"))
        return memory, Swap(swapped, None if both is None or limit is None else max(both - limit, 0))

    def _process_directory(self) -> str:
        return self._directories.get("pids") or self._directories.get("memory") or self._directories["cpuacct"]

    def _huge_pages(self) -> tuple[HugePages, ...]:
        if "hugetlb" not in self._directories:
            return ()
        return tuple(
            HugePages(size, usage, parse.number(self._read_once("hugetlb", f"hugetlb.{size}.max_usage_in_bytes")))
            for size in huge_page_sizes()
            if (usage := parse.number(self._read_once("hugetlb", f"hugetlb.{size}.usage_in_bytes"))) is not None
        )


class CgroupV2(CgroupReader):
    """A cgroup of the unified hierarchy."""

    def details(self) -> Details:
        """Read what metrics need besides."""
        cpu = parse.pairs(self._read("", "cpu.stat"))
        memory = parse.pairs(self._read("", "memory.stat"))
        events = parse.pairs(self._read_once("", "memory.events"))
        faults = (parse.value(memory, b"pgfault"), parse.value(memory, b"pgmajfault"))
        kernel = parse.value(memory, b"kernel")
        return Details(
            cpu_user_ns=parse.value(cpu, b"user_usec", 1000),
            cpu_system_ns=parse.value(cpu, b"system_usec", 1000),
            periods=parse.value(cpu, b"nr_periods"),
            throttled_periods=parse.value(cpu, b"nr_throttled"),
            throttled_ns=parse.value(cpu, b"throttled_usec", 1000),
            cache=parse.value(memory, b"file"),
            # Kernels before 5.18 have no sum of it.
            kernel=kernel if kernel is not None else parse.value(memory, b"kernel_stack"),
            mapped_file=parse.value(memory, b"file_mapped"),
            active_file=parse.value(memory, b"active_file"),
            inactive_file=parse.value(memory, b"inactive_file"),
            max_usage=parse.number(self._read_once("", "memory.peak")),
            limit_hits=parse.value(events, b"max"),
            oom_kills=parse.value(events, b"oom_kill"),
            # This version counts with the cgroups below only.
            faults=faults,
            hierarchy_faults=faults,
            threads=parse.number(self._read_once("", "pids.current")),
            threads_max=parse.limit(self._read_once("", "pids.max")),
            io=parse.io_stat(self._read_once("", "io.stat")),
            huge_pages=tuple(
                HugePages(size, usage, None)
                for size in huge_page_sizes()
                if (usage := parse.number(self._read_once("", f"hugetlb.{size}.current"))) is not None
            ),
        )

    def _cpu_ns(self) -> int | None:
        return parse.value(parse.pairs(self._read("", "cpu.stat")), b"usage_usec", 1000)

    def _memory(self) -> tuple[Memory | None, Swap | None]:
        usage = parse.number(self._read("", "memory.current"))
        if usage is None:
            return None, None
        stat = parse.pairs(self._read("", "memory.stat"))
        memory = Memory(
            usage=usage,
            limit=parse.limit(self._read("", "memory.max")),
            working_set=max(usage - (parse.value(stat, b"inactive_file") or 0), 0),
            rss=parse.value(stat, b"anon"),
            page_faults=parse.value(stat, b"pgfault"),
            major_page_faults=parse.value(stat, b"pgmajfault"),
        )
        swapped = parse.number(self._read("", "memory.swap.current"))
        if swapped is None:
            return memory, None
        return memory, Swap(swapped, parse.limit(self._read("", "memory.swap.max")))

    def _process_directory(self) -> str:
        return self._directories.get("", "")


class _Budget:
    """How many descriptors may still be kept."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Files:
    """Small files read again and again, each by a descriptor that is kept while the budget lasts."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget
        self._kept: dict[str, int] = {}

    def read(self, path: str) -> bytes:
        """The file as it is now; empty where it cannot be read."""
        if (fd := self._kept.get(path)) is not None:
            try:
                return os.pread(fd, _FILE_SIZE, 0)
            except OSError:
                self._drop(path)  # its cgroup is gone; there may be another of the same name by now
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        if self._budget.left > 0:
            self._budget.left -= 1
            self._kept[path] = fd
        try:
            return os.pread(fd, _FILE_SIZE, 0)
        except OSError:
            return b""
        finally:
            if path not in self._kept:
                os.close(fd)

    def close(self) -> None:
        """Close what is kept."""
        for path in list(self._kept):
            self._drop(path)

    def _drop(self, path: str) -> None:
        os.close(self._kept.pop(path))
        self._budget.left += 1


def _read_whole(path: str) -> bytes:
    """All of a file up to _MAX_PROCESSES_SIZE: the kernel gives a long list page by page."""
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_PROCESSES_SIZE)
    except OSError:
        return b""


def huge_page_sizes() -> list[str]:
    """The kernel's sizes of huge pages as the hugetlb controller's files have them: "2MB", "1GB"."""
    sizes = []
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        return []
    for name in names:
        kilobytes = parse.number(name.removeprefix("hugepages-").removesuffix("kB").encode())
        if kilobytes is not None:
            sizes.append(_size(kilobytes))
    return sizes


def _size(kilobytes: int) -> str:
    for unit, scale in (("GB", 1 << 20), ("MB", 1 << 10)):
        if kilobytes >= scale:
            return f"{kilobytes // scale}{unit}"
    return f"{kilobytes}KB"
