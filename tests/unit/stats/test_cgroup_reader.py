"""Readers of both cgroup versions, on directories with captured files."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import pytest

from criserver.stats import CgroupReaders, Pressure, Stall
from criserver.stats.cgroup_reader import CgroupReader

V1 = {
    "cpu/cpu.stat": "nr_periods 40\nnr_throttled 38\nthrottled_time 3100000000\nnr_bursts 0\nburst_time 0\n",
    "cpuacct/cpuacct.usage": "16239780\n",
    "cpuacct/cpuacct.stat": "user 3\nsystem 1\n",
    "memory/memory.stat": (
        "cache 1\nrss 2\npgfault 10\npgmajfault 1\nhierarchical_memory_limit 9223372036854771712\n"
        "total_cache 3006464\ntotal_rss 245760\ntotal_mapped_file 8192\ntotal_swap 4096\n"
        "total_pgfault 866\ntotal_pgmajfault 2\ntotal_inactive_file 4096\ntotal_active_file 12288\n"
    ),
    "memory/memory.usage_in_bytes": "4452352\n",
    "memory/memory.limit_in_bytes": "67108864\n",
    "memory/memory.memsw.limit_in_bytes": "100663296\n",
    "memory/memory.max_usage_in_bytes": "5066752\n",
    "memory/memory.kmem.usage_in_bytes": "1064960\n",
    "memory/memory.failcnt": "7\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "pids/pids.current": "12\n",
    "pids/pids.max": "max\n",
    "pids/cgroup.procs": "100\n101\n",
    "pids/nested/cgroup.procs": "102\n",
    "blkio/blkio.throttle.io_service_bytes_recursive": "254:0 Read 4096\n254:0 Write 0\nTotal 4096\n",
    "blkio/blkio.throttle.io_serviced_recursive": "254:0 Read 1\nTotal 1\n",
    "unified/cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=538\n",
}

V2 = {
    "cpu.stat": (
        "usage_usec 36374\nuser_usec 30000\nsystem_usec 6374\nnice_usec 0\ncore_sched.force_idle_usec 0\n"
        "nr_periods 40\nnr_throttled 38\nthrottled_usec 3100000\nnr_bursts 0\nburst_usec 0\n"
    ),
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=538\n",
    "memory.pressure": "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    "memory.current": "4452352\n",
    "memory.max": "67108864\n",
    "memory.peak": "5066752\n",
    "memory.swap.current": "4096\n",
    "memory.swap.max": "0\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 4\noom_kill 3\noom_group_kill 0\n",
    "memory.stat": (
        "anon 245760\nfile 3006464\nkernel 1064960\nkernel_stack 16384\nfile_mapped 8192\n"
        "inactive_anon 0\nactive_anon 241664\ninactive_file 4096\nactive_file 12288\npgfault 866\npgmajfault 2\n"
    ),
    "pids.current": "12\n",
    "pids.max": "500\n",
    "cgroup.procs": "100\n101\n",
    "nested/cgroup.procs": "102\n",
    "io.stat": "254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n",
}


def lay(top: Path, files: dict[str, str], *, below_controller: bool) -> None:
    for name, text in files.items():
        controller, _, rest = name.partition("/") if below_controller else ("", "", name)
        path = top / controller / "pod" / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def v1(tmp_path: Path) -> CgroupReader:
    lay(tmp_path, V1, below_controller=True)
    roots = {name: f"{tmp_path}/{name}" for name in ("cpu", "cpuacct", "memory", "pids", "blkio")}
    return CgroupReaders({**roots, "": f"{tmp_path}/unified"}).reader("/pod")


@pytest.fixture
def v2(tmp_path: Path) -> CgroupReader:
    lay(tmp_path, V2, below_controller=False)
    return CgroupReaders({"": str(tmp_path)}).reader("/pod")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_both_versions_tell_the_same_of_memory(version: str, request: pytest.FixtureRequest) -> None:
    reader: CgroupReader = request.getfixturevalue(version)
    usage, details = reader.usage(), reader.details()
    assert usage.memory is not None
    assert (usage.memory.usage, usage.memory.limit) == (4452352, 67108864)
    assert usage.memory.working_set == 4452352 - 4096
    assert usage.memory.available == 67108864 - usage.memory.working_set
    assert (usage.memory.rss, usage.memory.page_faults, usage.memory.major_page_faults) == (245760, 866, 2)
    assert usage.swap is not None
    assert usage.swap.usage == 4096
    assert (details.cache, details.kernel, details.mapped_file) == (3006464, 1064960, 8192)
    assert (details.active_file, details.inactive_file) == (12288, 4096)
    assert (details.max_usage, details.limit_hits, details.oom_kills) == (5066752, 7, 3)
    assert details.hierarchy_faults == (866, 2)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_both_versions_tell_the_same_of_the_rest(version: str, request: pytest.FixtureRequest) -> None:
    reader: CgroupReader = request.getfixturevalue(version)
    details = reader.details()
    assert (details.periods, details.throttled_periods, details.throttled_ns) == (40, 38, 3_100_000_000)
    assert details.threads == 12
    assert [(io.major, io.read_bytes, io.reads) for io in details.io] == [(254, 4096, 1)]
    assert sorted(reader.processes()) == [100, 101, 102]


def test_version_1_has_its_own_units(v1: CgroupReader) -> None:
    usage, details = v1.usage(), v1.details()
    assert usage.cpu is not None
    assert usage.cpu.total_ns == 16239780
    assert (details.cpu_user_ns, details.cpu_system_ns) == (30_000_000, 10_000_000)
    assert details.faults == (10, 1)
    assert usage.swap is not None
    assert usage.swap.limit == 100663296 - 67108864  # its file counts memory and swap together
    assert details.threads_max is None
    assert usage.cpu_pressure == Pressure(Stall(0, 0, 0, 538_000), None)


def test_version_2_has_its_own_units(v2: CgroupReader) -> None:
    usage, details = v2.usage(), v2.details()
    assert usage.cpu is not None
    assert usage.cpu.total_ns == 36_374_000
    assert (details.cpu_user_ns, details.cpu_system_ns) == (30_000_000, 6_374_000)
    assert usage.swap is not None
    assert usage.swap.available == 0
    assert details.threads_max == 500
    assert usage.memory_pressure is not None
    assert usage.io_pressure is None


@pytest.mark.parametrize(
    "roots", [{"": "/nowhere"}, {"memory": "/nowhere", "cpuacct": "/nowhere"}, {"cpu": "/nowhere"}]
)
def test_a_cgroup_that_is_not_there_has_no_figures(roots: dict[str, str]) -> None:
    reader = CgroupReaders({"": "/nowhere", **roots}).reader("/pod")
    usage, details = reader.usage(), reader.details()
    assert (usage.cpu, usage.memory, usage.swap, usage.cpu_pressure) == (None, None, None, None)
    assert (details.periods, details.threads, details.io) == (None, None, ())
    assert reader.processes() == []


def test_the_working_set_is_never_negative(v2: CgroupReader, tmp_path: Path) -> None:
    (tmp_path / "pod/memory.current").write_text("1000\n")
    memory = v2.usage().memory
    assert memory is not None
    assert memory.working_set == 0


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(seconds * 1e9))


def test_the_rate_is_since_a_reading_at_least_a_second_old(
    v2: CgroupReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(seconds: float, used_usec: int) -> int | None:
        set_clock(monkeypatch, seconds)
        (tmp_path / "pod/cpu.stat").write_text(f"usage_usec {used_usec}\n")
        cpu = v2.usage().cpu
        assert cpu is not None
        return cpu.rate

    assert rate(100, 1_000_000) is None
    assert rate(100.5, 1_500_000) is None  # too soon to say
    assert rate(102, 2_000_000) == 500_000_000
    assert rate(102.1, 2_100_000) == 500_000_000  # still the last figure
    assert rate(104, 5_000_000) == 1_500_000_000
    assert rate(106, 10) is None  # another cgroup of the same name


def test_files_stay_open_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, V2, below_controller=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 12))
    cgroups = CgroupReaders({"": str(tmp_path)})

    def kept() -> list[str]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            # Another file of this process may be closed meanwhile, or have a longer path than the kernel shows.
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return [link for link in links if link.startswith(str(tmp_path))]

    for _ in range(2):
        memory = cgroups.reader("/pod").usage().memory
        assert memory is not None
        assert memory.usage == 4452352
        assert len(kept()) == 3
    cgroups.retain({"/pod"})
    assert len(kept()) == 3
    cgroups.retain(set())
    assert kept() == []
