"""Where cgroup version 2 has its values (kernel Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

from criserver.stats import kernel_text
from criserver.stats.cgroup_reader import CgroupReader
from criserver.stats.cgroup_values import CgroupDetails, HugePages, Memory, Swap
from criserver.stats.huge_pages import huge_page_sizes


class CgroupV2(CgroupReader):
    """A cgroup of version 2, in the unified hierarchy."""

    def details(self) -> CgroupDetails:
        """Read the other values for metrics."""
        cpu = kernel_text.pairs(self._read("", "cpu.stat"))
        memory = kernel_text.pairs(self._read("", "memory.stat"))
        events = kernel_text.pairs(self._read_once("", "memory.events"))
        faults = (kernel_text.value(memory, b"pgfault"), kernel_text.value(memory, b"pgmajfault"))
        kernel = kernel_text.value(memory, b"kernel")
        return CgroupDetails(
            cpu_user_ns=kernel_text.value(cpu, b"user_usec", 1000),
            cpu_system_ns=kernel_text.value(cpu, b"system_usec", 1000),
            periods=kernel_text.value(cpu, b"nr_periods"),
            throttled_periods=kernel_text.value(cpu, b"nr_throttled"),
            throttled_ns=kernel_text.value(cpu, b"throttled_usec", 1000),
            cache=kernel_text.value(memory, b"file"),
            # Kernels before 5.18 do not have the sum.
            kernel=kernel if kernel is not None else kernel_text.value(memory, b"kernel_stack"),
            mapped_file=kernel_text.value(memory, b"file_mapped"),
            active_file=kernel_text.value(memory, b"active_file"),
            inactive_file=kernel_text.value(memory, b"inactive_file"),
            max_usage=kernel_text.number(self._read_once("", "memory.peak")),
            limit_hits=kernel_text.value(events, b"max"),
            oom_kills=kernel_text.value(events, b"oom_kill"),
            # This version has only the counts with the cgroups below.
            faults=faults,
            hierarchy_faults=faults,
            threads=kernel_text.number(self._read_once("", "pids.current")),
            threads_max=kernel_text.limit(self._read_once("", "pids.max")),
            io=kernel_text.io_stat(self._read_once("", "io.stat")),
            huge_pages=tuple(
                HugePages(size, usage, None)
                for size in huge_page_sizes()
                if (usage := kernel_text.number(self._read_once("", f"hugetlb.{size}.current"))) is not None
            ),
        )

    def _cpu_ns(self) -> int | None:
        return kernel_text.value(kernel_text.pairs(self._read("", "cpu.stat")), b"usage_usec", 1000)

    def _memory(self) -> tuple[Memory | None, Swap | None]:
        usage = kernel_text.number(self._read("", "memory.current"))
        if usage is None:
            return None, None
        stat = kernel_text.pairs(self._read("", "memory.stat"))
        memory = Memory(
            usage=usage,
            limit=kernel_text.limit(self._read("", "memory.max")),
            working_set=max(usage - (kernel_text.value(stat, b"inactive_file") or 0), 0),
            rss=kernel_text.value(stat, b"anon"),
            page_faults=kernel_text.value(stat, b"pgfault"),
            major_page_faults=kernel_text.value(stat, b"pgmajfault"),
            shmem=kernel_text.value(stat, b"shmem"),
        )
        swapped = kernel_text.number(self._read("", "memory.swap.current"))
        if swapped is None:
            return memory, None
        return memory, Swap(swapped, kernel_text.limit(self._read("", "memory.swap.max")))

    def _process_directory(self) -> str:
        return self._directories.get("", "")
