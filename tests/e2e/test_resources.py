"""Resource limits as the container's cgroup has them, at the start and after an update."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host
from tests.support.node import DRIVER, Node, limit_of, refused
from tests.support.pods import limited
from tests.support.waiting import eventually

ON_V1 = "memory" in cgroups.roots()


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def seen(pod: str, container: str) -> dict[str, str]:
    """The limits in the container's own cgroup, named as version 1 has them; shares are version 2's weight there."""
    if ON_V1:
        return {
            "quota": limit_of(pod, container, "cpu", "cpu.cfs_quota_us"),
            "period": limit_of(pod, container, "cpu", "cpu.cfs_period_us"),
            "shares": limit_of(pod, container, "cpu", "cpu.shares"),
            "memory": limit_of(pod, container, "memory", "memory.limit_in_bytes"),
            "cpus": limit_of(pod, container, "cpuset", "cpuset.cpus"),
        }
    quota, period = limit_of(pod, container, "", "cpu.max").split()
    return {
        "quota": quota,
        "period": period,
        "shares": limit_of(pod, container, "", "cpu.weight"),
        "memory": limit_of(pod, container, "", "memory.max"),
        "cpus": limit_of(pod, container, "", "cpuset.cpus"),
    }


# What shares become: as they are, or weights by the formula of runc before 1.3.2 (linear), or of later ones.
SHARES = {512: {"512"}, 256: {"256"}} if ON_V1 else {512: {"20", "59"}, 256: {"10", "35"}}


def test_limits_are_set_at_the_start(node: Node, pod: str) -> None:
    limits: dict[str, Any] = {
        "cpu_period": 50000,
        "cpu_quota": 20000,
        "cpu_shares": 512,
        "memory_limit_in_bytes": 64 << 20,
        "memory_swap_limit_in_bytes": 64 << 20,
        "cpuset_cpus": "0",
        "oom_score_adj": 321,
    }
    container = node.run(pod, "c", ["sleep", "1000"], **limited(**limits))
    found = seen(pod, container)
    assert found.pop("shares") in SHARES[512]
    assert found == {"quota": "20000", "period": "50000", "memory": str(64 << 20), "cpus": "0"}
    assert node.sh(container, "cat /proc/1/oom_score_adj") == "321\n"
    assert node.status(container).resources.linux == cri.LinuxContainerResources(**limits)


def test_a_running_container_is_given_new_limits(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], **limited(cpu_shares=512, memory_limit_in_bytes=64 << 20))
    node.client.UpdateContainerResources(
        container_id=container,
        linux=cri.LinuxContainerResources(memory_limit_in_bytes=128 << 20, cpu_quota=30000, oom_score_adj=500),
    )
    found = seen(pod, container)
    assert found["shares"] in SHARES[512]
    assert (found["quota"], found["period"], found["memory"]) == ("30000", "100000", str(128 << 20))
    assert node.sh(container, "cat /proc/1/oom_score_adj") == "500\n"
    shown = node.status(container).resources.linux
    assert (shown.cpu_shares, shown.cpu_quota, shown.memory_limit_in_bytes) == (512, 30000, 128 << 20)
    node.kill()
    node.start()
    assert node.status(container).resources.linux == shown


@pytest.mark.skipif("2MB" not in host.facts().hugepage_sizes, reason="this node cannot limit huge pages of 2 MB")
def test_a_running_container_is_given_new_limits_of_huge_pages(node: Node, pod: str) -> None:
    def limits(pages: int) -> cri.LinuxContainerResources:
        return cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=pages << 21)])

    name = "hugetlb.2MB.limit_in_bytes" if ON_V1 else "hugetlb.2MB.max"
    hierarchy = "hugetlb" if ON_V1 else ""
    container = node.run(pod, "c", ["sleep", "1000"], linux=cri.LinuxContainerConfig(resources=limits(2)))
    assert limit_of(pod, container, hierarchy, name) == str(2 << 21)
    # The second one leaves the pages as they are.
    for changed in (limits(1), cri.LinuxContainerResources(cpu_shares=256)):
        node.client.UpdateContainerResources(container_id=container, linux=changed)
        assert limit_of(pod, container, hierarchy, name) == str(1 << 21)


def test_a_created_container_starts_with_its_new_limits(node: Node, pod: str) -> None:
    container = node.create(pod, "c", ["sleep", "1000"], **limited(cpu_shares=512))
    node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=256))
    node.client.StartContainer(container_id=container)
    assert seen(pod, container)["shares"] in SHARES[256]


@pytest.mark.skipif(ON_V1, reason="writes files of cgroup version 2")
def test_files_of_version_2_are_changed_by_name(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], **limited(unified={"memory.high": str(48 << 20)}))
    assert limit_of(pod, container, "", "memory.high") == str(48 << 20)
    changed = cri.LinuxContainerResources(unified={"memory.high": str(40 << 20), "pids.max": "77"})
    node.client.UpdateContainerResources(container_id=container, linux=changed)
    assert limit_of(pod, container, "", "memory.high") == str(40 << 20)
    assert limit_of(pod, container, "", "pids.max") == "77"


@pytest.mark.skipif(ON_V1, reason="is told of version 2")
def test_swap_is_what_is_left_of_the_sum_of_version_1(node: Node, pod: str) -> None:
    limits = {"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 80 << 20}
    container = node.run(pod, "c", ["sleep", "1000"], **limited(**limits))
    assert limit_of(pod, container, "", "memory.swap.max") == str(16 << 20)
    none = node.run(pod, "none", ["sleep", "1000"], **limited(memory_limit_in_bytes=64 << 20))
    assert limit_of(pod, none, "", "memory.swap.max") == "0"


@pytest.mark.skipif(DRIVER != "systemd", reason="the cgroup driver is not systemd's")
def test_systemd_knows_the_limits_and_takes_none_back(node: Node, pod: str) -> None:
    """It sets all that it knows of a unit again when it reads its configuration."""
    container = node.run(pod, "c", ["sleep", "1000"], **limited(cpu_quota=20000, memory_limit_in_bytes=64 << 20))
    changed = cri.LinuxContainerResources(cpu_shares=256, memory_limit_in_bytes=96 << 20, unified={"pids.max": "77"})
    node.client.UpdateContainerResources(container_id=container, linux=changed)
    before = (seen(pod, container), limit_of(pod, container, "", "pids.max"))
    assert before[0]["memory"] == str(96 << 20)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert (seen(pod, container), limit_of(pod, container, "", "pids.max")) == before
    command = ["systemctl", "show", "--value", "--property=MemoryMax", f"criserver-{container}.scope"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(96 << 20)


def test_refusals(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], **limited(memory_limit_in_bytes=64 << 20))
    before = node.status(container).resources
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "limits"):
        node.client.UpdateContainerResources(
            container_id=container, linux=cri.LinuxContainerResources(cpuset_cpus="4095")
        )
    assert node.status(container).resources == before
    with refused(grpc.StatusCode.NOT_FOUND, "f" * 64):
        node.client.UpdateContainerResources(container_id="f" * 64)
    if ON_V1:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "unified"):
            node.create(pod, "v2", ["true"], **limited(unified={"memory.high": "1"}))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "oom_score_adj"):
        node.create(pod, "score", ["true"], **limited(oom_score_adj=1001))


def test_a_container_that_has_exited_takes_new_limits(node: Node, pod: str) -> None:
    """The kubelet may ask for them as the container ends."""
    container = node.run(pod, "c", ["true"], **limited(memory_limit_in_bytes=64 << 20))
    node.wait(container)
    node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=2))
    status = node.status(container)
    assert (status.state, status.resources.linux.cpu_shares) == (cri.CONTAINER_EXITED, 2)


@pytest.mark.skipif(not host.facts().swap_accounting, reason="this node does not count swap")
def test_the_status_has_the_swap_limit_in_force(node: Node, pod: str) -> None:
    def swap() -> int:
        return node.status(container).resources.linux.memory_swap_limit_in_bytes

    container = node.run(pod, "c", ["sleep", "1000"], **limited(memory_limit_in_bytes=64 << 20))
    assert swap() == 64 << 20
    for asked, expected in (((64, 80), 80), ((72, 0), 72), ((96, 0), 96)):
        limits = cri.LinuxContainerResources(
            memory_limit_in_bytes=asked[0] << 20, memory_swap_limit_in_bytes=asked[1] << 20
        )
        node.client.UpdateContainerResources(container_id=container, linux=limits)
        assert swap() == expected << 20
        if ON_V1:
            assert limit_of(pod, container, "memory", "memory.memsw.limit_in_bytes") == str(expected << 20)


def test_a_memory_limit_below_the_present_use(node: Node, pod: str) -> None:
    """The container keeps its limit, and its life: cgroup version 2 alone would kill it."""
    fill = "x=$(head -c 33554432 /dev/zero | tr '\\0' x); echo full; sleep 1000; echo $x"
    container = node.run(pod, "c", ["sh", "-c", fill], **limited(memory_limit_in_bytes=256 << 20))
    eventually(lambda: "full" in node.log(container))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, f"{8 << 20} bytes is below its present use of"):
        node.client.UpdateContainerResources(
            container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=8 << 20)
        )
    status = node.status(container)
    assert (status.state, status.resources.linux.memory_limit_in_bytes) == (cri.CONTAINER_RUNNING, 256 << 20)


def test_a_pods_resources_are_kept_and_shown(node: Node, pod: str) -> None:
    node.client.UpdatePodSandboxResources(
        pod_sandbox_id=pod,
        resources=cri.LinuxContainerResources(cpu_shares=99),
        overhead=cri.LinuxContainerResources(memory_limit_in_bytes=5),
    )
    info = json.loads(node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"])
    assert info["resources"] == {"cpu_shares": "99"}
    assert info["overhead"] == {"memory_limit_in_bytes": "5"}
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
