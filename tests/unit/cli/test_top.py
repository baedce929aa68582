"""``criserver top``: CPU from two readings, and what a pod and its containers use."""

from __future__ import annotations

from criserver.cli.top import uses
from criserver.pb.runtime.v1 import api_pb2 as cri


def cpu(nanoseconds: int, at: int) -> cri.CpuUsage:
    return cri.CpuUsage(timestamp=at, usage_core_nano_seconds=cri.UInt64Value(value=nanoseconds))


def container(key: str, used: cri.CpuUsage | None) -> cri.ContainerStats:
    return cri.ContainerStats(
        attributes=cri.ContainerAttributes(id=key, metadata=cri.ContainerMetadata(name=f"c-{key}")),
        cpu=used,
        memory=cri.MemoryUsage(working_set_bytes=cri.UInt64Value(value=100)),
        writable_layer=cri.FilesystemUsage(used_bytes=cri.UInt64Value(value=7)),
    )


def pod(used: cri.CpuUsage, *containers: cri.ContainerStats) -> cri.PodSandboxStats:
    metadata = cri.PodSandboxMetadata(name="web", namespace="shop")
    return cri.PodSandboxStats(
        attributes=cri.PodSandboxAttributes(id="p", metadata=metadata),
        linux=cri.LinuxPodSandboxStats(
            cpu=used,
            memory=cri.MemoryUsage(working_set_bytes=cri.UInt64Value(value=300)),
            process=cri.ProcessUsage(process_count=cri.UInt64Value(value=4)),
            containers=containers,
        ),
    )


def test_cpu_is_millicores_over_the_interval() -> None:
    stats = [pod(cpu(3_500_000_000, 3_000_000_000), container("a", cpu(500, 3_000_000_000)))]
    (use,) = uses(stats, {"p": (500_000_000, 1_000_000_000)}, containers=False)
    assert (use.pod, use.name, use.cpu, use.memory, use.processes, use.writable_layer) == (
        "shop/web", "", 1500, 300, 4, 7
    )  # fmt: skip


def test_what_was_not_there_before_has_no_cpu_and_a_counter_that_began_anew_is_zero() -> None:
    stats = [pod(cpu(10, 2000), container("new", cpu(10, 2000)), container("again", cpu(10, 2000)))]
    new, again = uses(stats, {"again": (5000, 1000)}, containers=True)
    assert (new.name, new.cpu, new.processes) == ("c-new", None, None)
    assert again.cpu == 0


def test_containers_that_do_not_run_are_left_out() -> None:
    stats = [pod(cpu(10, 2000), container("ended", None))]
    assert uses(stats, {}, containers=True) == []
    assert [use.writable_layer for use in uses(stats, {}, containers=False)] == [7]
