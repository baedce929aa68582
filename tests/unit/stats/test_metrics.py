"""The table of metrics: names, labels, and figures that are missing."""

from __future__ import annotations

import dataclasses
from typing import Any

from criserver.stats import (
    METRICS,
    CgroupUsage,
    ContainerLimits,
    Cpu,
    Descriptors,
    DiskUsage,
    FileSystem,
    InterfaceCounters,
    Measurements,
    Memory,
    Pressure,
    Stall,
    Swap,
    samples,
)
from criserver.stats.cgroup_values import CgroupDetails, HugePages
from criserver.stats.kernel_text import DeviceIo

NO_DETAILS: list[Any] = [*[None] * 13, (None, None), (None, None), None, None, (), ()]
ALL_DETAILS: list[Any] = [
    *range(1, 14),
    (14, 15),
    (16, 17),
    18,
    19,
    (DeviceIo(0, 0, 1, 2, 3, 4),),
    (HugePages("2MB", 1, 2),),
]
STALL = Stall(0.0, 0.0, 0.0, 2_500_000_000)
PRESSURE = Pressure(STALL, STALL)
NOTHING = Measurements(
    usage=CgroupUsage(1_700_000_000_000_000_000, None, None, None, None, None, None),
    details=CgroupDetails(*NO_DETAILS),
    processes=0,
)
EVERYTHING = Measurements(
    usage=CgroupUsage(
        timestamp=1_700_000_000_000_000_000,
        cpu=Cpu(3_900_000_000, 1),
        memory=Memory(10, 20, 9, 8, 7, 6),
        swap=Swap(5, None),
        cpu_pressure=PRESSURE,
        memory_pressure=PRESSURE,
        io_pressure=PRESSURE,
    ),
    details=CgroupDetails(*ALL_DETAILS),
    processes=3,
    descriptors=Descriptors(9, 2, 1024),
    interfaces=(InterfaceCounters("eth0", 1, 2, 3, 4, 5, 6, 7, 8),),
    disk=DiskUsage(1, 4096, 2),
    file_system=FileSystem("/dev/vda", 100, 10, 5),
    limits=ContainerLimits(cpu_quota=20_000, memory=64, swap=128),
    started_at=1_600_000_000_000_000_000,
)


def values(measured: Measurements) -> dict[str, dict[tuple[str, ...], int]]:
    found: dict[str, dict[tuple[str, ...], int]] = {}
    for metric, value, labels in samples(measured):
        found.setdefault(metric.name, {})[labels] = value
    return found


def test_each_metric_is_described_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.help.endswith(".") for metric in METRICS)
    totals = {name for name in names if name.endswith("_total")}
    assert {m.name for m in METRICS if m.counter} >= totals - {"container_fs_inodes_total"}


def test_where_all_is_known_each_metric_has_values_with_its_labels() -> None:
    found = values(EVERYTHING)
    assert found.keys() == {metric.name for metric in METRICS}
    for metric in METRICS:
        assert all(len(labels) == len(metric.labels) for labels in found[metric.name])


def test_where_nothing_is_known_nothing_is_made_up() -> None:
    assert values(NOTHING) == {"container_last_seen": {(): 1_700_000_000}, "container_processes": {(): 0}}


def test_times_are_whole_seconds() -> None:
    found = values(EVERYTHING)
    assert found["container_cpu_usage_seconds_total"] == {("total",): 3}
    assert found["container_start_time_seconds"] == {(): 1_600_000_000}
    assert found["container_pressure_memory_stalled_seconds_total"] == {(): 2}


def test_labels_of_what_there_are_several_of() -> None:
    found = values(EVERYTHING)
    assert found["container_memory_failures_total"] == {
        ("pgfault", "container"): 14,
        ("pgmajfault", "container"): 15,
        ("pgfault", "hierarchy"): 16,
        ("pgmajfault", "hierarchy"): 17,
    }
    assert found["container_network_transmit_packets_dropped_total"] == {("eth0",): 8}
    assert found["container_blkio_device_usage_total"] == {("0:0", "0", "0", "Read"): 1, ("0:0", "0", "0", "Write"): 2}
    assert found["container_hugetlb_usage_bytes"] == {("2MB",): 1}


def test_limits_that_were_not_given_are_the_kernels_defaults() -> None:
    found = values(EVERYTHING)
    assert found["container_spec_cpu_period"] == {(): 100_000}
    assert found["container_spec_cpu_shares"] == {(): 1024}
    unlimited = values(dataclasses.replace(EVERYTHING, limits=ContainerLimits(cpu_quota=-1, memory=-1, swap=-1)))
    assert "container_spec_cpu_quota" not in unlimited
    assert unlimited["container_spec_memory_limit_bytes"] == {(): 0}
    assert unlimited["container_spec_memory_swap_limit_bytes"] == {(): 0}
