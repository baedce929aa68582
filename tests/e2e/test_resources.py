"""Limits as the container's own cgroup has them, at the start and after an update."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.e2e.node import Node
from tests.e2e.test_bad_input import refused


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def limited(**limits) -> dict[str, cri.LinuxContainerConfig]:
    return {"linux": cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**limits))}


def seen(pod: str, container: str, controller: str, name: str) -> str:
    """A file of the container's cgroup."""
    return Path(cgroups.roots()[controller], "criserver", pod, container, name).read_text().strip()


pytestmark = pytest.mark.skipif("memory" not in cgroups.roots(), reason="reads files of cgroup version 1")


def test_limits_are_set_at_the_start(node: Node, pod: str):
    limits = {
        "cpu_period": 50000,
        "cpu_quota": 20000,
        "cpu_shares": 512,
        "memory_limit_in_bytes": 64 << 20,
        "memory_swap_limit_in_bytes": 64 << 20,
        "cpuset_cpus": "0",
        "oom_score_adj": 321,
    }
    container = node.run(pod, "c", ["sleep", "1000"], **limited(**limits))
    assert seen(pod, container, "cpu", "cpu.cfs_period_us") == "50000"
    assert seen(pod, container, "cpu", "cpu.cfs_quota_us") == "20000"
    assert seen(pod, container, "cpu", "cpu.shares") == "512"
    assert seen(pod, container, "memory", "memory.limit_in_bytes") == str(64 << 20)
    assert seen(pod, container, "cpuset", "cpuset.cpus") == "0"
    assert node.sh(container, "cat /proc/1/oom_score_adj") == "321\n"
    assert node.status(container).resources.linux == cri.LinuxContainerResources(**limits)


def test_a_running_container_is_given_new_limits(node: Node, pod: str):
    container = node.run(pod, "c", ["sleep", "1000"], **limited(cpu_shares=512, memory_limit_in_bytes=64 << 20))
    node.client.UpdateContainerResources(
        container_id=container,
        linux=cri.LinuxContainerResources(memory_limit_in_bytes=128 << 20, cpu_quota=30000, oom_score_adj=500),
    )
    assert seen(pod, container, "memory", "memory.limit_in_bytes") == str(128 << 20)
    assert seen(pod, container, "cpu", "cpu.cfs_quota_us") == "30000"
    assert seen(pod, container, "cpu", "cpu.shares") == "512"
    assert node.sh(container, "cat /proc/1/oom_score_adj") == "500\n"
    shown = node.status(container).resources.linux
    assert (shown.cpu_shares, shown.cpu_quota, shown.memory_limit_in_bytes) == (512, 30000, 128 << 20)
    node.kill()
    node.start()
    assert node.status(container).resources.linux == shown


def test_a_created_container_starts_with_its_new_limits(node: Node, pod: str):
    container = node.create(pod, "c", ["sleep", "1000"], **limited(cpu_shares=512))
    node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=256))
    node.client.StartContainer(container_id=container)
    assert seen(pod, container, "cpu", "cpu.shares") == "256"


def test_refusals(node: Node, pod: str):
    container = node.run(pod, "c", ["sleep", "1000"], **limited(memory_limit_in_bytes=64 << 20))
    before = node.status(container).resources
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "limits"):
        node.client.UpdateContainerResources(
            container_id=container, linux=cri.LinuxContainerResources(cpuset_cpus="4095")
        )
    assert node.status(container).resources == before
    with refused(grpc.StatusCode.NOT_FOUND, "f" * 64):
        node.client.UpdateContainerResources(container_id="f" * 64)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "unified"):
        node.create(pod, "v2", ["true"], **limited(unified={"memory.high": "1"}))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "oom_score_adj"):
        node.create(pod, "score", ["true"], **limited(oom_score_adj=1001))
    node.client.StopContainer(container_id=container, timeout=0)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=2))


def test_a_pods_resources_are_kept_and_shown(node: Node, pod: str):
    node.client.UpdatePodSandboxResources(
        pod_sandbox_id=pod,
        resources=cri.LinuxContainerResources(cpu_shares=99),
        overhead=cri.LinuxContainerResources(memory_limit_in_bytes=5),
    )
    info = json.loads(node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"])
    assert info["resources"] == {"cpu_shares": "99"}
    assert info["overhead"] == {"memory_limit_in_bytes": "5"}
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
