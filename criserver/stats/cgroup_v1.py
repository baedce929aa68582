"""Where cgroup version 1 has its values (kernel Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

from criserver.stats import kernel_text
from criserver.stats.cgroup_reader import CgroupReader
from criserver.stats.cgroup_values import CgroupDetails, HugePages, Memory, Swap
from criserver.stats.huge_pages import huge_page_sizes

# The unit of cpuacct.stat, USER_HZ, is 100 on every architecture that Linux has user space for.
_TICK_NS = 10_000_000


class CgroupV1(CgroupReader):
    """A cgroup of version 1: each controller has a hierarchy of its own."""

    def details(self) -> CgroupDetails:
        """Read the other values for metrics."""
        ticks = kernel_text.pairs(self._read_once("cpuacct", "cpuacct.stat"))
        cpu = kernel_text.pairs(self._read_once("cpu", "cpu.stat"))
        memory = kernel_text.pairs(self._read("memory", "memory.stat"))
        return CgroupDetails(
            cpu_user_ns=kernel_text.value(ticks, b"user", _TICK_NS),
            cpu_system_ns=kernel_text.value(ticks, b"system", _TICK_NS),
            periods=kernel_text.value(cpu, b"nr_periods"),
            throttled_periods=kernel_text.value(cpu, b"nr_throttled"),
            throttled_ns=kernel_text.value(cpu, b"throttled_time"),
            cache=kernel_text.value(memory, b"total_cache"),
            kernel=kernel_text.number(self._read_once("memory", "memory.kmem.usage_in_bytes")),
            mapped_file=kernel_text.value(memory, b"total_mapped_file"),
            active_file=kernel_text.value(memory, b"total_active_file"),
            inactive_file=kernel_text.value(memory, b"total_inactive_file"),
            max_usage=kernel_text.number(self._read_once("memory", "memory.max_usage_in_bytes")),
            limit_hits=kernel_text.number(self._read_once("memory", "memory.failcnt")),
            oom_kills=kernel_text.value(
                kernel_text.pairs(self._read_once("memory", "memory.oom_control")), b"oom_kill"
            ),
            faults=(kernel_text.value(memory, b"pgfault"), kernel_text.value(memory, b"pgmajfault")),
            hierarchy_faults=(
                kernel_text.value(memory, b"total_pgfault"),
                kernel_text.value(memory, b"total_pgmajfault"),
            ),
            threads=kernel_text.number(self._read_once("pids", "pids.current")),
            threads_max=kernel_text.limit(self._read_once("pids", "pids.max")),
            io=kernel_text.blkio(
                self._read_once("blkio", "blkio.throttle.io_service_bytes_recursive"),
                self._read_once("blkio", "blkio.throttle.io_serviced_recursive"),
            ),
            huge_pages=self._huge_pages(),
        )

    def _cpu_ns(self) -> int | None:
        return kernel_text.number(self._read("cpuacct", "cpuacct.usage"))

    def _memory(self) -> tuple[Memory | None, Swap | None]:
        usage = kernel_text.number(self._read("memory", "memory.usage_in_bytes"))
        if usage is None:
            return None, None
        stat = kernel_text.pairs(self._read("memory", "memory.stat"))
        limit = kernel_text.limit(self._read("memory", "memory.limit_in_bytes"))
        memory = Memory(
            usage=usage,
            limit=limit,
            working_set=max(usage - (kernel_text.value(stat, b"total_inactive_file") or 0), 0),
            rss=kernel_text.value(stat, b"total_rss"),
            page_faults=kernel_text.value(stat, b"total_pgfault"),
            major_page_faults=kernel_text.value(stat, b"total_pgmajfault"),
            shmem=kernel_text.value(stat, b"total_shmem"),
        )
        swapped = kernel_text.value(stat, b"total_swap")
        if swapped is None:
            return memory, None
        # memory.memsw is the limit of memory and swap together.
        both = kernel_text.limit(self._read("memory", "memory.memsw.limit_in_bytes"))
        return memory, Swap(swapped, None if both is None or limit is None else max(both - limit, 0))

    def _process_directory(self) -> str:
        return self._directories.get("pids") or self._directories.get("memory") or self._directories["cpuacct"]

    def _huge_pages(self) -> tuple[HugePages, ...]:
        if "hugetlb" not in self._directories:
            return ()
        return tuple(
            HugePages(size, usage, kernel_text.number(self._read_once("hugetlb", f"hugetlb.{size}.max_usage_in_bytes")))
            for size in huge_page_sizes()
            if (usage := kernel_text.number(self._read_once("hugetlb", f"hugetlb.{size}.usage_in_bytes"))) is not None
        )
