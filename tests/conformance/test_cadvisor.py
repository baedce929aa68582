"""A kubelet whose cAdvisor takes the daemon for containerd: names and network of pods in /metrics/cadvisor.

The kubelet is the one on PATH, without an API server. PodAndContainerStatsFromCRI is off, as it is by default.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support import https, static_pod
from tests.support.node import DRIVER, Node
from tests.support.registry import free_port
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.skipif(shutil.which("kubelet") is None, reason="kubelet is not on PATH"),
    pytest.mark.skipif(bool(glob.glob("/sys/fs/cgroup/memory/kubepods*")), reason="another kubelet runs here"),
    pytest.mark.skipif(DRIVER != "cgroupfs", reason="the test gives the kubelet the driver cgroupfs"),
]
POD = f"{static_pod.NAME}-n1"


class Kubelet:
    """It watches ``manifests``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.directory = f"{node.base}/kube"
        self.manifests = f"{self.directory}/manifests"
        os.makedirs(self.manifests)
        self._port = free_port()
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{node.socket}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "cgroupDriver": "cgroupfs",
            "enforceNodeAllocatable": [],
            "staticPodPath": self.manifests,
            "fileCheckFrequency": "2s",
            "podLogsDir": f"{self.directory}/logs",
            "volumePluginDir": f"{self.directory}/plugins",
            "address": "127.0.0.1",
            "port": self._port,
            "readOnlyPort": 0,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "oomScoreAdj": 0,
            "imageGCHighThresholdPercent": 100,
            "makeIPTablesUtilChains": False,
        }
        with open(f"{self.directory}/kubelet.json", "w") as f:
            json.dump(configuration, f)
        words = ["kubelet", "--config", f"{self.directory}/kubelet.json", "--hostname-override", "n1"]
        words += ["--root-dir", f"{self.directory}/kubelet", "--containerd", node.socket]
        words += ["--housekeeping-interval", "1s"]
        with open(f"{self.directory}/log", "wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.directory
            )

    def get(self, path: str) -> str:
        with contextlib.suppress(OSError):  # it does not serve yet
            return https.fetched(f"https://127.0.0.1:{self._port}{path}", 10)
        return "{}" if path.startswith("/stats") else ""

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """What /metrics/cadvisor has of a name and of the pod."""
        families = text_string_to_metric_families(self.get("/metrics/cadvisor"))
        return [
            (s.labels, s.value) for f in families for s in f.samples if s.name == name and s.labels.get("pod") == POD
        ]

    def summary(self) -> dict[str, Any]:
        pods = json.loads(self.get("/stats/summary")).get("pods") or []
        return next((pod for pod in pods if pod["podRef"]["name"] == POD), {})

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.manifests}/static.json")
        with contextlib.suppress(AssertionError):
            eventually(
                lambda: all(p.state == cri.SANDBOX_NOTREADY for p in self._node.client.ListPodSandbox().items), 30
            )
        self._process.terminate()
        self._process.wait(30)
        self._node.remove_pods()
        tops = glob.glob("/sys/fs/cgroup/*/kubepods") + glob.glob("/sys/fs/cgroup/kubepods")
        if tops:
            command = ["find", *tops, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
            subprocess.run(command, capture_output=True, check=False)


@pytest.fixture(scope="module")
def kubelet(node: Node) -> Iterator[Kubelet]:
    kubelet = Kubelet(node)
    try:
        yield kubelet
    finally:
        kubelet.close()


@pytest.fixture(autouse=True)
def clean_pods() -> None:
    """The pod is the kubelet's."""


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


def test_names_and_network_of_a_pod_over_a_restart_of_its_container(node: Node, kubelet: Kubelet) -> None:
    with open(f"{kubelet.manifests}/static.json", "w") as f:
        json.dump(static_pod.POD, f)
    eventually(lambda: 0 in running(node), 60)
    first = running(node)[0]
    seen(node, kubelet, first)

    summary = kubelet.summary()
    assert [c["name"] for c in summary["containers"]] == ["c"]
    assert summary["network"]["name"] == "eth0"
    assert summary["containers"][0]["memory"]["workingSetBytes"] > 0

    node.client.StopContainer(container_id=first, timeout=0)
    eventually(lambda: 1 in running(node), 60)
    seen(node, kubelet, running(node)[1])

    os.unlink(f"{kubelet.manifests}/static.json")
    eventually(lambda: not running(node), 60)
    eventually(lambda: not glob.glob("/sys/fs/cgroup/*/kubepods/burstable/pod*/*"), 30)


def seen(node: Node, kubelet: Kubelet, container: str) -> None:
    """cAdvisor has the container under its names, and the network of the pod as it is."""

    def has_container() -> bool:
        found = kubelet.samples("container_memory_working_set_bytes")
        return any(labels["name"] == container and value > 0 for labels, value in found)

    eventually(has_container, 60)
    ((labels, _),) = [s for s in kubelet.samples("container_memory_working_set_bytes") if s[0]["name"] == container]
    assert (labels["namespace"], labels["container"]) == ("default", "c")
    assert labels["image"] == "localhost/busybox:latest"
    assert labels["id"].endswith(f"/{container}")
    assert any(s[0]["container"] == "c" for s in kubelet.samples("container_cpu_usage_seconds_total"))

    def network() -> list[float]:
        return [v for labels, v in kubelet.samples("container_network_receive_bytes_total") if has_eth0(labels)]

    def has_eth0(labels: dict[str, str]) -> bool:
        return labels["interface"] == "eth0"

    eventually(lambda: network() == [received(node, container)], 60)
    assert kubelet.samples("container_network_transmit_errors_total")
