"""A kubelet without a cluster: static pods on the installed daemon, through systemd's cgroups."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from tests.node.installed import SOCKET, InstalledNode
from tests.support import static_pod
from tests.support.https import fetched

pytestmark = pytest.mark.skipif(shutil.which("kubelet") is None, reason="kubelet is not on PATH")

PORT = 10250


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


def test_a_static_pod_is_started_probed_restarted_logged_and_removed(node: InstalledNode, kubelet: Kubelet) -> None:
    def is_in_its_slice(container: str) -> None:
        with open(f"/proc/{node.pid(container)}/cgroup") as f:
            cgroup = f.read().strip().removeprefix("0::")
        assert cgroup.startswith("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod")
        assert cgroup.endswith(f"/criserver-{container}.scope")
        limits = node.sh(container, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
        assert limits == f"{64 << 20}\n50000 100000\n"

    try:
        static_pod.live(node, kubelet.manifests, "node", kubelet.get, is_in_its_slice)
    except AssertionError:
        print(kubelet.log())
        raise
