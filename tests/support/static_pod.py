"""The life of a static pod under a kubelet, on whatever node that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node
from tests.support.waiting import SLOWNESS, eventually

NAME = "static"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": NAME, "namespace": "default"},
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


def live(
    node: Node, manifests: str, kubelet: str, ask: Callable[[str], str], running: Callable[[str], object] | None = None
) -> None:
    """Started, logged, probed, restarted, measured and removed.

    ``manifests`` is the directory of a kubelet that is called ``kubelet`` and answers to ``ask``; ``running`` is given
    the container.
    """
    name = f"{NAME}-{kubelet}"

    def attempts() -> dict[int, cri.Container]:
        """The pod's containers by attempt, those that run."""
        chosen = cri.ContainerFilter(
            label_selector={"io.kubernetes.pod.name": name}, state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)
        )
        return {c.metadata.attempt: c for c in node.client.ListContainers(filter=chosen).containers}

    def measured() -> dict[str, Any]:
        pods = json.loads(ask("/stats/summary"))["pods"]
        return next((pod for pod in pods if pod["podRef"]["name"] == name), {})

    with open(f"{manifests}/static.json", "w") as f:
        json.dump(POD, f)
    eventually(lambda: 0 in attempts(), 60 * SLOWNESS)
    first = attempts()[0].id
    if running is not None:
        running(first)
    eventually(lambda: "started" in ask(f"/containerLogs/default/{name}/c"), 20 * SLOWNESS)
    # The probe is an ExecSync; it finds the file, until it is gone.
    node.sh(first, "rm /alive")
    eventually(lambda: 1 in attempts(), 60 * SLOWNESS)
    status = node.status(first)
    assert (status.state, status.exit_code) == (cri.CONTAINER_EXITED, 137)
    eventually(lambda: "network" in measured() and measured().get("containers"), 20 * SLOWNESS)
    found = measured()
    assert found["containers"][0]["memory"]["workingSetBytes"] > 0
    assert found["network"]["rxBytes"] >= 0
    os.unlink(f"{manifests}/static.json")
    eventually(lambda: not attempts(), 60 * SLOWNESS)
