"""A kubelet without an API server: the names and networks that its cAdvisor has of pods, and the traces of its calls.

Its cAdvisor takes the daemon for containerd, as PodAndContainerStatsFromCRI is off, which is the default. Kubelet and
daemon send their traces to one collector, if OpenTelemetry is installed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.telemetry import otel_libraries
from tests.support import kubelet as kubelets
from tests.support import static_pod
from tests.support.fixtures import serving
from tests.support.kubelet import StandaloneKubelet
from tests.support.node import DRIVER, RUNTIME, Node, handler
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.support.collector import Collector

pytestmark = [
    pytest.mark.skipif(shutil.which("kubelet") is None, reason="kubelet is not on PATH"),
    pytest.mark.skipif(kubelets.another_runs(), reason="another kubelet runs here"),
]
POD = f"{static_pod.NAME}-n1"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector | None]:
    """None if OpenTelemetry is not installed: the daemon has no traces then."""
    if not otel_libraries.are_installed():
        yield None
        return
    from tests.support.collector import collecting

    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, collector: Collector | None) -> Iterator[Node]:
    tables = handler("runc", RUNTIME)
    if collector is not None:
        tables += f'[tracing]\nendpoint = "{collector.address}"\n'
    with serving(busybox_archive, tables) as node:
        yield node


@pytest.fixture(scope="module")
def kubelet(node: Node, collector: Collector | None) -> Iterator[StandaloneKubelet]:
    directory = f"{node.base}/kube"
    settings = kubelets.beside_others(directory) | {"cgroupDriver": DRIVER}
    if collector is not None:
        settings["tracing"] = {"endpoint": collector.address, "samplingRatePerMillion": 1_000_000}
    words = ("--containerd", node.socket, "--housekeeping-interval", "1s")
    kubelet = StandaloneKubelet(directory, node.socket, "n1", *words, **settings)
    try:
        yield kubelet
    finally:
        for manifest in glob.glob(f"{kubelet.manifests}/*"):
            os.unlink(manifest)
        with contextlib.suppress(AssertionError):
            eventually(lambda: all(p.state == cri.SANDBOX_NOTREADY for p in node.client.ListPodSandbox().items), 30)
        kubelet.end()
        node.remove_pods()
        kubelets.remove_cgroups(DRIVER)


@pytest.fixture(autouse=True)
def clean_pods() -> None:
    """The pods are the kubelet's."""


def samples(kubelet: StandaloneKubelet, name: str) -> list[tuple[dict[str, str], float]]:
    """What /metrics/cadvisor has of a name and of the pod."""
    with contextlib.suppress(OSError):  # it does not serve yet
        families = text_string_to_metric_families(kubelet.get("/metrics/cadvisor"))
        return [
            (s.labels, s.value) for f in families for s in f.samples if s.name == name and s.labels.get("pod") == POD
        ]
    return []


def summary(kubelet: StandaloneKubelet) -> dict[str, Any]:
    pods = json.loads(kubelet.get("/stats/summary")).get("pods") or []
    return next((pod for pod in pods if pod["podRef"]["name"] == POD), {})


def running(node: Node) -> dict[int, str]:
    """The IDs of the pod's containers that run, by attempt."""
    chosen = cri.ContainerFilter(
        label_selector={"io.kubernetes.pod.name": POD}, state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)
    )
    return {c.metadata.attempt: c.id for c in node.client.ListContainers(filter=chosen).containers}


def received(node: Node, container: str) -> int:
    """The bytes that eth0 of a container's pod has received."""
    with open(f"/proc/{node.pid(container)}/net/dev") as f:
        return next(int(line.split()[1]) for line in f if line.strip().startswith("eth0:"))


def test_names_and_network_of_a_pod_over_a_restart_of_its_container(node: Node, kubelet: StandaloneKubelet) -> None:
    with open(f"{kubelet.manifests}/static.json", "w") as f:
        json.dump(static_pod.POD, f)
    eventually(lambda: 0 in running(node), 60)
    first = running(node)[0]
    seen(node, kubelet, first)

    found = summary(kubelet)
    assert [c["name"] for c in found["containers"]] == ["c"]
    assert found["network"]["name"] == "eth0"
    assert found["containers"][0]["memory"]["workingSetBytes"] > 0
    assert found["containers"][0]["rootfs"]["inodesUsed"] > 0

    node.client.StopContainer(container_id=first, timeout=0)
    eventually(lambda: 1 in running(node), 60)
    seen(node, kubelet, running(node)[1])

    os.unlink(f"{kubelet.manifests}/static.json")
    eventually(lambda: not running(node), 60)
    eventually(lambda: not kubelets.cgroups_of_pods(), 30)


def seen(node: Node, kubelet: StandaloneKubelet, container: str) -> None:
    """cAdvisor has the container under its names, and the network of the pod as it is."""

    def has_container() -> bool:
        found = samples(kubelet, "container_memory_working_set_bytes")
        return any(labels["name"] == container and value > 0 for labels, value in found)

    eventually(has_container, 60)
    ((labels, _),) = [s for s in samples(kubelet, "container_memory_working_set_bytes") if s[0]["name"] == container]
    assert (labels["namespace"], labels["container"]) == ("default", "c")
    assert labels["image"] == "localhost/busybox:latest"
    assert container in labels["id"].rpartition("/")[2]
    assert any(s[0]["container"] == "c" for s in samples(kubelet, "container_cpu_usage_seconds_total"))

    def network() -> list[float]:
        return [v for labels, v in samples(kubelet, "container_network_receive_bytes_total") if has_eth0(labels)]

    def has_eth0(labels: dict[str, str]) -> bool:
        return labels["interface"] == "eth0"

    eventually(lambda: network() == [received(node, container)], 60)
    assert samples(kubelet, "container_network_transmit_errors_total")


def test_the_daemons_spans_are_children_of_the_kubelets(
    node: Node, kubelet: StandaloneKubelet, collector: Collector | None
) -> None:
    if collector is None:
        pytest.skip("OpenTelemetry is not installed: pip install 'criserver[tracing]'")
    from tests.support.collector import attributes

    container = {"name": "c", "image": "localhost/busybox:latest", "imagePullPolicy": "Never", "command": ["true"]}
    spec = {"restartPolicy": "Never", "containers": [container]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "traced", "namespace": "shop"}, "spec": spec}
    with open(f"{kubelet.manifests}/traced.json", "w") as f:
        json.dump(pod, f)

    def way(span: Any) -> list[str]:
        """The spans from one of the daemon's up to the root of its trace, each as its service and name."""
        found, above = [], span
        while above is not None:
            assert above.trace_id == span.trace_id
            found.append(f"{collector.service(above)} {above.name}")
            above = spans.get(above.parent_span_id)
        return found

    service = "runtime.v1.RuntimeService"
    rpcs = [f"{service}/{name}" for name in ("RunPodSandbox", "CreateContainer", "StartContainer")]

    def sent() -> list[Any]:
        """The spans about the pod: the kubelet's of its work, and the daemon's of its calls, in the order of time."""
        found = [span for span in collector.all() if attributes(span).get("k8s.pod.name") == "traced-n1"]
        traces = {span.trace_id for span in found if span.name == rpcs[0]}
        return sorted((s for s in found if s.trace_id in traces), key=lambda span: span.start_time_unix_nano)

    eventually(lambda: {*rpcs, "syncPod"} <= {span.name for span in sent()}, 60)
    calls = [span for span in sent() if span.name in rpcs]
    assert [span.name for span in calls] == rpcs
    spans = {span.span_id: span for span in collector.all()}
    for call in calls:
        assert way(call) == [f"criserver {call.name}", f"kubelet {call.name}", "kubelet syncPod"]
        assert attributes(call)["k8s.namespace.name"] == "shop"
    (plugin,) = (s for s in spans.values() if s.name == "CNI bridge ADD" and s.trace_id == calls[0].trace_id)
    assert way(plugin) == ["criserver CNI bridge ADD", *way(calls[0])]
