"""The reader of one cgroup, for statistics and metrics: the part that is the same for cgroup versions 1 and 2.

A file is opened once and read at offset 0 from then on, so a list of many containers is cheap. Where a cgroup is gone,
or has no such controller, the value is None: nothing here raises. Reading needs no shim and no process of the
container.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

from criserver.stats import kernel_text
from criserver.stats.cgroup_files import DescriptorBudget, KeptFiles, read_whole
from criserver.stats.cgroup_values import CgroupDetails, CgroupUsage, Cpu, Memory, Swap

# A privileged container may make cgroups of its own without end.
_MAX_NESTED = 256
# Below this interval the rate of CPU use depends on the clock tick more than on the container.
_RATE_INTERVAL_NS = 1_000_000_000


class CgroupReader(ABC):
    """Reads one cgroup. The subclasses know the files of cgroup version 1 and 2."""

    def __init__(self, roots: Mapping[str, str], path: str, budget: DescriptorBudget) -> None:
        self._files = KeptFiles(budget)
        self._directories = {controller: root + path for controller, root in roots.items()}
        # The base of the next rate: CPU nanoseconds, and the monotonic clock at that time.
        self._base: tuple[int, int] | None = None
        self._rate: int | None = None

    def usage(self) -> CgroupUsage:
        """Read the values for statistics."""
        timestamp, total = time.time_ns(), self._cpu_ns()
        memory, swap = self._memory()
        return CgroupUsage(
            timestamp=timestamp,
            cpu=None if total is None else Cpu(total, self._next_rate(total)),
            memory=memory,
            swap=swap,
            # On hosts with version 1, a unified hierarchy may be mounted too. It has the pressure files alone.
            cpu_pressure=kernel_text.pressure(self._read("", "cpu.pressure")),
            memory_pressure=kernel_text.pressure(self._read("", "memory.pressure")),
            io_pressure=kernel_text.pressure(self._read("", "io.pressure")),
        )

    @abstractmethod
    def details(self) -> CgroupDetails:
        """Read the other values for metrics."""

    def processes(self) -> list[int]:
        """The PIDs in this cgroup and those below it.

        They come from cgroup.procs. pids.current counts threads, but CRI and cAdvisor count processes.
        """
        pids: list[int] = []
        pending = [self._process_directory()]
        for _ in range(_MAX_NESTED):
            if not pending:
                break
            directory = pending.pop()
            pids += kernel_text.numbers(read_whole(f"{directory}/cgroup.procs"))
            try:
                if os.stat(directory).st_nlink == 2:
                    continue  # no cgroup below it: each would be a link
                with os.scandir(directory) as entries:
                    pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
        return pids

    def close(self) -> None:
        """Close the descriptors. A later reading opens them again."""
        self._files.close()

    @abstractmethod
    def _cpu_ns(self) -> int | None: ...

    @abstractmethod
    def _memory(self) -> tuple[Memory | None, Swap | None]: ...

    @abstractmethod
    def _process_directory(self) -> str: ...

    def _read(self, controller: str, name: str) -> bytes:
        """A file that every statistics call reads; empty where it does not exist."""
        directory = self._directories.get(controller)
        return self._files.read(f"{directory}/{name}") if directory is not None else b""

    def _read_once(self, controller: str, name: str) -> bytes:
        """A file that only metrics read: its descriptor is closed after the read."""
        directory = self._directories.get(controller)
        return read_whole(f"{directory}/{name}") if directory is not None else b""

    def _next_rate(self, total: int) -> int | None:
        """The rate since a base that is at least an interval old. Calls within one interval get the same rate."""
        now = time.monotonic_ns()
        if self._base is None or total < self._base[0]:
            self._base, self._rate = (total, now), None
        elif (interval := now - self._base[1]) >= _RATE_INTERVAL_NS:
            self._rate = (total - self._base[0]) * 1_000_000_000 // interval
            self._base = (total, now)
        return self._rate
