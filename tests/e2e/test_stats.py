"""Statistics and metrics of real containers change with what the containers do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host
from tests.support.node import GATEWAY, Node, cgroup, processes
from tests.support.waiting import SLOWNESS, eventually

MIB = 1 << 20
SLEEP = ["sleep", "1000"]


def stats_of(node: Node, container: str) -> cri.ContainerStats:
    return node.client.ContainerStats(container_id=container).stats


def pod_of(node: Node, pod: str) -> cri.LinuxPodSandboxStats:
    return node.client.PodSandboxStats(pod_sandbox_id=pod).stats.linux


def ids(listed: Any) -> set[str]:
    return {entry.attributes.id for entry in listed.stats}


def limits(**resources: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**resources))


def test_cpu_time_and_its_rate_follow_the_work(node: Node) -> None:
    pod = node.run_pod()
    busy = node.run(pod, "busy", ["sh", "-c", "while :; do :; done"])
    idle = node.run(pod, "idle", SLEEP)
    begun = time.monotonic_ns()
    first = stats_of(node, busy).cpu
    least = time.monotonic_ns()
    assert first.timestamp > 0
    assert not first.HasField("usage_nano_cores")  # there is nothing yet to reckon it from
    stats_of(node, idle)
    pod_of(node, pod)
    time.sleep(1.2)  # a rate is of a second at least
    least = time.monotonic_ns() - least
    second = stats_of(node, busy).cpu
    most = time.monotonic_ns() - begun
    rest, whole = stats_of(node, idle).cpu, pod_of(node, pod).cpu
    worked = second.usage_core_nano_seconds.value - first.usage_core_nano_seconds.value
    assert 0 < worked <= most + 100_000_000
    # How much of a processor it gets depends on what else the machine does.
    assert worked * 10**9 // most <= second.usage_nano_cores.value <= worked * 10**9 // least
    assert rest.usage_nano_cores.value < second.usage_nano_cores.value
    assert whole.usage_core_nano_seconds.value >= second.usage_core_nano_seconds.value
    assert whole.usage_nano_cores.value > rest.usage_nano_cores.value


def test_stalls_are_told_where_the_kernel_counts_them(node: Node) -> None:
    given = limits(cpu_period=100_000, cpu_quota=10_000, memory_limit_in_bytes=64 * MIB)
    pod = node.run_pod()
    container = node.run(pod, "c", ["sh", "-c", "while :; do :; done"], linux=given)
    directory = cgroups.roots().get("", "") + cgroup(pod, container)
    if not os.path.exists(f"{directory}/cpu.pressure"):
        pytest.skip("the kernel counts no stalls by cgroup (PSI)")
    # It is made to wait nine tenths of the time.
    stalled = 100_000
    eventually(lambda: stats_of(node, container).cpu.psi.Some.Total > stalled)
    stats = stats_of(node, container)
    assert stats.memory.psi.HasField("Full")
    assert stats.io.psi.HasField("Some")
    assert eventually(lambda: stats_of(node, container).cpu.psi.Some.Avg10) > 1
    whole = pod_of(node, pod)
    assert whole.cpu.psi.Some.Total >= stalled
    assert whole.io.HasField("psi")


def test_the_working_set_is_what_was_allocated(node: Node) -> None:
    limited = limits(memory_limit_in_bytes=200 * MIB, memory_swap_limit_in_bytes=200 * MIB)
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP, linux=limited)
    before = stats_of(node, container).memory
    node.sh(container, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=50")
    after = stats_of(node, container)
    assert 45 * MIB < after.memory.working_set_bytes.value - before.working_set_bytes.value < 55 * MIB
    assert after.memory.usage_bytes.value >= after.memory.working_set_bytes.value
    assert after.memory.available_bytes.value == 200 * MIB - after.memory.working_set_bytes.value
    assert after.memory.page_faults.value > before.page_faults.value
    assert after.swap.swap_available_bytes.value == 0
    assert pod_of(node, pod).memory.working_set_bytes.value >= after.memory.working_set_bytes.value - MIB


def test_without_a_limit_nothing_is_said_of_what_is_available(node: Node) -> None:
    container = node.run(node.run_pod(), "c", SLEEP)
    assert not stats_of(node, container).memory.HasField("available_bytes")


def test_network_counters_move_and_are_the_pods_own(node: Node) -> None:
    pod, other = node.run_pod("talking"), node.run_pod("silent")
    container = node.run(pod, "c", SLEEP)
    before, silent = pod_of(node, pod).network, pod_of(node, other).network
    assert before.default_interface.name == "eth0"
    assert [i.name for i in before.interfaces] == ["eth0"]
    node.sh(container, f"ping -c 5 -s 1000 -i 0.2 {GATEWAY}")  # the bridge, which is the pods' gateway
    after = pod_of(node, pod).network
    assert after.timestamp > before.timestamp
    assert 5000 < after.default_interface.tx_bytes.value - before.default_interface.tx_bytes.value < 20_000
    assert after.default_interface.rx_bytes.value > before.default_interface.rx_bytes.value + 5000
    grown = pod_of(node, other).network.default_interface.rx_bytes.value - silent.default_interface.rx_bytes.value
    assert grown < 4000  # what is told to all; the other's were 5 KiB


def test_a_pod_without_eth0_has_another_default_interface(node: Node) -> None:
    """A kubelet reads the default one without a look whether it is there, and a pod may rename or delete it."""
    pod = node.run_pod()
    capabilities = cri.Capability(add_capabilities=["NET_ADMIN"])
    security = cri.LinuxContainerSecurityContext(capabilities=capabilities)
    container = node.run(pod, "c", SLEEP, linux=cri.LinuxContainerConfig(security_context=security))
    node.sh(container, "ip link set eth0 down && ip link set eth0 name other")
    network = pod_of(node, pod).network
    assert (network.default_interface.name, [i.name for i in network.interfaces]) == ("other", ["other"])
    node.sh(container, "ip link delete other")
    assert not pod_of(node, pod).HasField("network")


def test_a_stopped_pods_namespace_is_let_go(node: Node) -> None:
    pod = node.run_pod()
    assert pod_of(node, pod).network.default_interface.name == "eth0"

    def kept() -> list[str]:
        return [link for link in node.descriptors() if link.endswith("/net/dev")]

    assert len(kept()) == 1
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    assert kept() == []
    assert not pod_of(node, pod).HasField("network")


def test_a_pod_on_the_hosts_network_has_no_network_figures(node: Node) -> None:
    options = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
    security = cri.LinuxSandboxSecurityContext(namespace_options=options)
    pod = node.run_pod(linux=cri.LinuxPodSandboxConfig(security_context=security))
    assert not pod_of(node, pod).HasField("network")


def test_processes_are_counted_not_threads(node: Node) -> None:
    pod = node.run_pod()
    node.run(pod, "one", ["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
    node.run(pod, "two", SLEEP)
    eventually(lambda: pod_of(node, pod).process.process_count.value == 4)


def test_the_writable_layer_is_measured_soon_and_again(node: Node) -> None:
    container = node.run(node.run_pod(), "c", SLEEP)
    first = eventually(lambda: stats_of(node, container).writable_layer.timestamp and stats_of(node, container), 9.5)
    node.sh(container, "dd if=/dev/zero of=/fill bs=1M count=8; touch /a /b /c")
    mountpoint = node.client.ImageFsInfo().container_filesystems[0].fs_id.mountpoint
    assert first.writable_layer.fs_id.mountpoint == mountpoint

    def grown() -> bool:
        latest = stats_of(node, container).writable_layer
        return (
            latest.used_bytes.value - first.writable_layer.used_bytes.value >= 8 * MIB
            and latest.inodes_used.value - first.writable_layer.inodes_used.value == 4
        )

    eventually(grown)


def test_what_does_not_run_has_no_usage(node: Node) -> None:
    pod = node.run_pod()
    created = node.create(pod, "created", SLEEP)
    ended = node.run(pod, "ended", ["true"])
    node.wait(ended)
    for container in (created, ended):
        stats = stats_of(node, container)
        assert stats.attributes.metadata.name in ("created", "ended")
        assert not stats.HasField("cpu")
        assert not stats.HasField("memory")
    assert ids(node.client.ListContainerStats()) == {created, ended}
    assert [c.attributes.id for c in pod_of(node, pod).containers] == [created, ended]


def test_lists_are_filtered_as_asked(node: Node) -> None:
    red, blue = node.run_pod("red", labels={"colour": "red"}), node.run_pod("blue", labels={"colour": "blue"})
    first = node.run(red, "first", SLEEP, labels={"tier": "web", "app": "x"})
    second = node.run(red, "second", SLEEP, labels={"tier": "db", "app": "x"})
    third = node.run(blue, "third", SLEEP, labels={"tier": "web"}, annotations={"why": "test"})

    def containers(**wanted: Any) -> set[str]:
        answer = node.client.ListContainerStats(filter=cri.ContainerStatsFilter(**wanted))
        streamed = node.client.StreamContainerStats(filter=cri.ContainerStatsFilter(**wanted))
        assert {s.attributes.id for page in streamed for s in page.container_stats} == ids(answer)
        return ids(answer)

    def pods(**wanted: Any) -> set[str]:
        answer = node.client.ListPodSandboxStats(filter=cri.PodSandboxStatsFilter(**wanted))
        streamed = node.client.StreamPodSandboxStats(filter=cri.PodSandboxStatsFilter(**wanted))
        assert {s.attributes.id for page in streamed for s in page.pod_sandbox_stats} == ids(answer)
        return ids(answer)

    assert containers() == {first, second, third}
    assert containers(id=first) == containers(id=first[:12]) == {first}
    assert containers(pod_sandbox_id=red) == {first, second}
    assert containers(label_selector={"tier": "web"}) == {first, third}
    assert containers(label_selector={"tier": "web", "app": "x"}) == {first}
    assert containers(pod_sandbox_id=blue, label_selector={"app": "x"}) == set()
    assert containers(id="nothing") == set()
    assert pods() == {red, blue}
    assert pods(id=red[:12]) == {red}
    assert pods(label_selector={"colour": "blue"}) == {blue}
    assert pods(id=red, label_selector={"colour": "blue"}) == set()
    attributes = stats_of(node, third).attributes
    assert (attributes.labels["tier"], attributes.annotations["why"]) == ("web", "test")


@pytest.fixture
def stopped_shims(node: Node) -> Iterator[Callable[[], int]]:
    """Stops all shims of the node, and lets them go on at the end."""
    stopped: list[int] = []

    def stop() -> int:
        for pid, words in processes():
            if "shims" in words and f"in {node.state}/containers/" in words:
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        return len(stopped)

    yield stop
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


def test_stopped_shims_change_nothing(node: Node, stopped_shims: Callable[[], int]) -> None:
    pod = node.run_pod()
    containers = {node.run(pod, f"c{i}", SLEEP) for i in range(3)}
    assert stopped_shims() == 3
    listed = node.client.ListContainerStats(deadline=8 * SLOWNESS)
    assert ids(listed) == containers
    assert all(s.cpu.usage_core_nano_seconds.value > 0 for s in listed.stats)
    assert len(node.client.ListPodSandboxStats(deadline=8 * SLOWNESS).stats[0].linux.containers) == 3
    assert len(node.client.ListPodSandboxMetrics(deadline=8 * SLOWNESS).pod_metrics[0].container_metrics) == 3


def test_every_metric_has_a_descriptor_and_its_labels(node: Node) -> None:
    limited = limits(cpu_period=100_000, cpu_quota=20_000, cpu_shares=512, memory_limit_in_bytes=64 * MIB)
    pod = node.run_pod("metered")
    container = node.run(pod, "c", SLEEP, linux=limited)
    eventually(lambda: stats_of(node, container).writable_layer.timestamp)
    descriptors = {d.name: list(d.label_keys) for d in node.client.ListMetricDescriptors().descriptors}
    (metered,) = node.client.ListPodSandboxMetrics().pod_metrics
    assert metered.pod_sandbox_id == pod
    assert [c.container_id for c in metered.container_metrics] == [container]
    for metric in (*metered.metrics, *metered.container_metrics[0].metrics):
        assert len(metric.label_values) == len(descriptors[metric.name]), metric
        assert metric.timestamp > 0
    streamed = [m for page in node.client.StreamPodSandboxMetrics() for m in page.pod_sandbox_metrics]
    assert [m.pod_sandbox_id for m in streamed] == [pod]


def metric(node: Node, name: str) -> int:
    """A metric of the only container."""
    (metered,) = node.client.ListPodSandboxMetrics().pod_metrics
    return {m.name: m.value.value for m in metered.container_metrics[0].metrics}.get(name, 0)


def test_metrics_say_what_the_container_was_given_and_does(node: Node) -> None:
    # Of a processor that is busy otherwise it has to get more than this, or it is never made to wait for its limit.
    given = {"cpu_shares": 512, "memory_limit_in_bytes": 64 * MIB}
    pod = node.run_pod("metered")
    begun = time.time()
    script = "sleep 1000 & sleep 1000 & while :; do :; done"
    image = node.client.ImageStatus(image=cri.ImageSpec(image="localhost/busybox:latest")).image.id
    # As a kubelet: by its ID, and without a limit for swap.
    container = node.run(
        pod, "c", ["sh", "-c", script], linux=limits(**given), image=image, user_specified_image="localhost/busybox"
    )
    # Once it runs: the runtime itself would need minutes of it on a slow machine.
    node.client.UpdateContainerResources(
        container_id=container, linux=cri.LinuxContainerResources(cpu_period=100_000, cpu_quota=5_000)
    )
    eventually(lambda: stats_of(node, container).writable_layer.timestamp)
    # It gets little of a processor, so that its processes are not all there before it was made to wait.
    eventually(lambda: metric(node, "container_processes") == 3, 120)
    # A shell closes its input before it opens /dev/null for what it starts in the background.
    eventually(lambda: metric(node, "container_file_descriptors") >= 9, 120)
    eventually(lambda: metric(node, "container_cpu_cfs_throttled_periods_total") > 2, 120)
    keys = {d.name: list(d.label_keys) for d in node.client.ListMetricDescriptors().descriptors}
    asked = time.time()
    (metered,) = node.client.ListPodSandboxMetrics().pod_metrics
    own = {m.name: m for m in metered.container_metrics[0].metrics}
    values = {name: metric.value.value for name, metric in own.items()}
    assert values["container_spec_cpu_quota"] == 5_000
    assert values["container_spec_cpu_shares"] == 512
    assert values["container_spec_memory_limit_bytes"] == 64 * MIB
    # The limit in force, where the node counts swap.
    assert values["container_spec_memory_swap_limit_bytes"] == (64 * MIB if host.facts().swap_accounting else 0)
    assert values["container_cpu_cfs_throttled_periods_total"] > 2
    assert values["container_processes"] == 3
    assert values["container_file_descriptors"] >= 9
    assert values["container_sockets"] == 0
    assert values["container_fs_usage_bytes"] == stats_of(node, container).writable_layer.used_bytes.value
    assert values["container_fs_limit_bytes"] > values["container_fs_usage_bytes"]
    assert int(begun) <= values["container_start_time_seconds"] <= values["container_last_seen"] <= time.time()
    assert values["container_last_seen"] >= int(asked)
    labels = dict(zip(keys["container_memory_rss"], own["container_memory_rss"].label_values, strict=True))
    assert labels == {
        "pod": "metered",
        "namespace": "e2e",
        "container": "c",
        "id": cgroup(pod, container),
        "image": "localhost/busybox:latest",
        "name": container,
    }
    assert own["container_memory_rss"].metric_type == cri.GAUGE
    assert own["container_cpu_usage_seconds_total"].metric_type == cri.COUNTER
    pods = {m.name: m for m in metered.metrics}
    assert pods["container_network_receive_bytes_total"].label_values[-1] == "eth0"
    assert pods["container_processes"].value.value == 3


def test_statistics_go_on_after_the_daemon_is_killed(node: Node) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    before = pod_of(node, pod).network.default_interface.rx_bytes.value
    node.kill()
    node.start()
    assert stats_of(node, container).memory.working_set_bytes.value > 0
    assert pod_of(node, pod).network.default_interface.rx_bytes.value >= before
