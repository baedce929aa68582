"""A kubelet without a cluster: static pods on the installed daemon, through systemd's cgroups."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.node.installed import SOCKET, InstalledNode
from tests.support import static_pod
from tests.support.kubelet import StandaloneKubelet

pytestmark = pytest.mark.skipif(shutil.which("kubelet") is None, reason="kubelet is not on PATH")


@pytest.fixture(scope="module")
def kubelet(node: InstalledNode) -> Iterator[StandaloneKubelet]:
    kubelet = StandaloneKubelet(
        tempfile.mkdtemp(prefix="kubelet-"),
        SOCKET,
        "node",
        cgroupDriver="systemd",
        runtimeRequestTimeout="10m",
        port=10250,
        evictionHard={"memory.available": "50Mi"},
        featureGates={"PodAndContainerStatsFromCRI": True},
    )
    try:
        yield kubelet
    finally:
        kubelet.end()


def test_a_static_pod_is_started_probed_restarted_logged_and_removed(
    node: InstalledNode, kubelet: StandaloneKubelet
) -> None:
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
