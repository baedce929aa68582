"""A Deployment that is scaled up and down on a kubelet with each runtime, in turn: what a user of a cluster waits for.

    python -m bench.kubelet [--rounds N] [--pods M] [--containerd PATH]

Kubernetes' programs are those on PATH. README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from bench import isolation
from bench.cluster import ControlPlane, Kubelet
from bench.images import IMAGE
from bench.nodes import Node
from bench.run import Run, Sizes
from bench.table import Row, text

ROWS = (
    Row("ready", "kubelet", "until all pods are Ready", "s"),
    Row("started", "kubelet", "until the last container has started", "s"),
    Row("first", "kubelet", "until the first container has started", "s"),
    Row("gone", "kubelet", "scaled to 0: until all pods are gone", "s"),
)
# Seconds after a turn: the kubelet removes the cgroups of the pods.
REST = 3.0
_COMMAND = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
_DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"


class Deployment:
    """A Deployment without pods, whose pods go to one node."""

    def __init__(self, plane: ControlPlane, node: Node) -> None:
        self._plane, self._node, name = plane, node, node.name
        self._pods = f"/api/v1/namespaces/default/pods?labelSelector=app%3D{name}"
        self._scale = f"{_DEPLOYMENTS}/{name}/scale"
        container = {"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": _COMMAND}
        pod = {"nodeSelector": {"kubernetes.io/hostname": name}, "containers": [container]}
        template = {"metadata": {"labels": {"app": name}}, "spec": pod}
        spec = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": template}
        kind = {"apiVersion": "apps/v1", "kind": "Deployment"}
        plane.call("POST", _DEPLOYMENTS, {**kind, "metadata": {"name": name}, "spec": spec})

    def turn(self, pods: int) -> dict[str, float]:
        """Scale it to a number of pods and to none again: seconds by row."""
        began, ready = self._scaled(pods, pods, lambda kind, pod: kind != "DELETED" and _is_ready(pod))
        client = self._node.client
        ids = [container.id for container in client.ListContainers().containers]
        started = [client.ContainerStatus(container_id=each).status.started_at / 1e9 - began for each in ids]
        if len(ids) != pods:
            raise RuntimeError(f"{self._node.name} has {len(ids)} containers, not {pods}: some were made twice")
        _, gone = self._scaled(0, pods, lambda kind, _: kind == "DELETED")
        self._node.remove_pods()  # what the kubelet would remove within a minute
        return {"ready": ready, "started": max(started), "first": min(started), "gone": gone}

    def _scaled(self, replicas: int, count: int, holds: Callable[[str, dict[str, Any]], bool]) -> tuple[float, float]:
        """Scale it, and wait until so many pods have had an event, of a kind and with the pod, for which ``holds``.

        The time of the request (seconds since the epoch), and the seconds from then on.
        """
        version = self._plane.call("GET", self._pods)["metadata"]["resourceVersion"]
        began, found = time.time(), set()
        self._plane.call("PATCH", self._scale, {"spec": {"replicas": replicas}})
        for event in self._plane.watch(self._pods, version):
            if holds(event["type"], event["object"]):
                found.add(event["object"]["metadata"]["uid"])
                if len(found) == count:
                    return began, time.time() - began
        raise RuntimeError(f"the watch of {self._node.name}'s pods ended at {len(found)} of {count}")


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def measure(options: argparse.Namespace) -> str:
    """The table, after a round that is not counted."""
    with isolation.scratch() as base:
        run = Run(base, options.containerd, Sizes(rounds=options.rounds))
        with (
            ControlPlane(base) as plane,
            run.nodes() as (ours, theirs),
            Kubelet(plane, ours, 1),
            Kubelet(plane, theirs, 2),
        ):
            deployments = {node: Deployment(plane, node) for node in (ours, theirs)}
            for number, node in run.turns([ours, theirs], warm_up=True):
                for row, value in deployments[node].turn(options.pods).items():
                    if number:
                        run.add(row, node.name, value)
                time.sleep(REST)
    return f"{options.pods} pods, {', '.join(run.runtimes)}\n{text(run.samples, ROWS)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kubelet", description="Measure a Deployment on kubelets with both runtimes."
    )
    parser.add_argument("--rounds", type=int, default=Sizes.rounds, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--pods", type=int, default=30, metavar="M", help="pods of the Deployment (%(default)s)")
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    isolation.run("bench.kubelet", parser, measure)


if __name__ == "__main__":
    main()
