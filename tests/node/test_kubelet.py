"""A kubelet without a cluster: static pods on the installed daemon, through systemd's cgroups."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.https import fetched
from tests.node.installed import SOCKET, InstalledNode, eventually

pytestmark = pytest.mark.skipif(shutil.which("kubelet") is None, reason="kubelet is not on PATH")

PORT = 10250
NAME = "work-node"  # a static pod has the node's name behind its own

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "work", "namespace": "default"},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {
                "name": "c",
                "image": "localhost/busybox:latest",
                "imagePullPolicy": "Never",
                "command": ["sh", "-c", "echo started; touch /alive; exec sleep 1000"],
                "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi", "cpu": "500m"}},
                "livenessProbe": {
                    "exec": {"command": ["test", "-e", "/alive"]},
                    "initialDelaySeconds": 5,
                    "periodSeconds": 5,
                    "timeoutSeconds": 30,
                    "failureThreshold": 1,
                },
            }
        ],
    },
}


class Kubelet:
    """It watches ``manifests``, and serves on PORT."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="kubelet-")
        self.manifests = f"{self.directory}/manifests"
        os.mkdir(self.manifests)
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "staticPodPath": self.manifests,
            "fileCheckFrequency": "2s",
            "cgroupDriver": "systemd",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "runtimeRequestTimeout": "10m",
            "address": "127.0.0.1",
            "port": PORT,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "evictionHard": {"memory.available": "50Mi"},
            "failSwapOn": False,
            "featureGates": {"PodAndContainerStatsFromCRI": True},
        }
        with open(f"{self.directory}/kubelet.json", "w") as f:
            json.dump(configuration, f)
        words = ["kubelet", "--config", f"{self.directory}/kubelet.json", "--hostname-override", "node"]
        with open(f"{self.directory}/log", "wb") as log:
            self.process = subprocess.Popen([*words, "--root-dir", f"{self.directory}/root"], stdout=log, stderr=log)

    def get(self, path: str) -> str:
        """What it answers."""
        return fetched(f"https://127.0.0.1:{PORT}{path}", 60)

    def log(self) -> str:
        with open(f"{self.directory}/log", errors="replace") as f:
            return f.read()[-4000:]


@pytest.fixture(scope="module")
def kubelet(node: InstalledNode) -> Iterator[Kubelet]:
    kubelet = Kubelet()
    try:
        yield kubelet
    finally:
        kubelet.process.terminate()
        kubelet.process.wait(60)


def attempts(node: InstalledNode) -> dict[int, cri.Container]:
    """The containers of the pod by attempt, those that run."""
    chosen = cri.ContainerFilter(
        label_selector={"io.kubernetes.pod.name": NAME}, state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)
    )
    return {c.metadata.attempt: c for c in node.client.ListContainers(filter=chosen).containers}


def test_a_static_pod_is_started_probed_restarted_logged_and_removed(node: InstalledNode, kubelet: Kubelet):
    try:
        with open(f"{kubelet.manifests}/work.json", "w") as f:
            json.dump(POD, f)
        eventually(lambda: 0 in attempts(node), 60)
        first = attempts(node)[0].id
        with open(f"/proc/{node.pid(first)}/cgroup") as f:
            cgroup = f.read().strip().removeprefix("0::")
        assert cgroup.startswith("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod")
        assert cgroup.endswith(f"/criserver-{first}.scope")
        assert node.sh(first, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max") == f"{64 << 20}\n50000 100000\n"
        eventually(lambda: "started" in kubelet.get(f"/containerLogs/default/{NAME}/c"))
        # The probe is an ExecSync; it finds the file, until it is gone.
        node.sh(first, "rm /alive")
        eventually(lambda: 1 in attempts(node), 60)
        status = node.status(first)
        assert (status.state, status.exit_code) == (cri.CONTAINER_EXITED, 137)
        summary = json.loads(kubelet.get("/stats/summary"))
        (pod,) = (p for p in summary["pods"] if p["podRef"]["name"] == NAME)
        assert pod["containers"][0]["memory"]["workingSetBytes"] > 0
        assert pod["network"]["rxBytes"] >= 0
        os.unlink(f"{kubelet.manifests}/work.json")
        eventually(lambda: not attempts(node), 60)
    except AssertionError:
        print(kubelet.log())
        raise
