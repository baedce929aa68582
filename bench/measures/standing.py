"""What running pods cost: memory, statistics, lists, an idle kubelet's polling, a restart; and how these grow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.lives import BarePod, Pod, timed
from bench.nodes import Criserver, Node
from bench.processes import memory, on_cpu
from bench.run import Run
from bench.table import FLOOR, percentile

_PODS = 60  # the rows are of this many, and of the highest step if there are fewer
_RESTARTED = 100
_TIMED = 10
_POD_UP = "pod up, ms"
_SETTLES = 2.0
_LISTS = 100


def measure(run: Run) -> None:
    """More pods step by step, with measurements at each; then fewer, with restarts at each."""
    steps = run.sizes.steps
    rows_at = _PODS if _PODS in steps else steps[-1]
    restarts_at = _RESTARTED if _RESTARTED in steps else steps[-1]
    with run.nodes() as nodes:
        have = 0
        for pods in steps:
            for _, node in run.turns(list(nodes), 1):
                run.grow(_POD_UP, node.name, pods, _grown(node, have, pods))
            run.grow(_POD_UP, FLOOR, pods, _by_hand(run, pods))
            have = pods
            time.sleep(_SETTLES)
            _step(run, list(nodes), pods, rows=pods == rows_at)
        for pods in reversed(steps):
            for node in nodes:
                node.remove_pods(keep=pods)
            _restarts(run, list(nodes), pods, row=pods == restarts_at)


def _grown(node: Node, have: int, pods: int) -> float:
    """More pods, four at a time, and the last ones one by one: the median of their milliseconds."""
    names = [f"standing{number}" for number in range(have, pods)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: Pod(node, name).up(), names[:-_TIMED]))
    found: list[float] = []
    for name in names[-_TIMED:]:
        Pod(node, name).up(lambda row, value: found.append(value) if row == "pod-up" else None)
    return statistics.median(found)


def _by_hand(run: Run, pods: int) -> float:
    """The median of pods by the bare tools, one by one and each removed at once, beside so many of either runtime."""
    found: list[float] = []
    for number in range(_TIMED):
        pod = BarePod(run.base, f"bare{pods}-{number}")
        pod.up(lambda row, value: found.append(value) if row == "pod-up" else None)
        pod.down()
    return statistics.median(found)


def _step(run: Run, nodes: list[Node], pods: int, *, rows: bool) -> None:
    """The measurements with this many pods."""
    for number, node in run.turns(nodes, run.sizes.rounds if rows else 1):
        values = _memory(node, pods)
        values["list"] = [timed(node.client.ListContainers)[1] for _ in range(_LISTS)]
        values["container-stats"] = _calls(run, node.client.ListContainerStats)
        values["pod-stats"] = _calls(run, node.client.ListPodSandboxStats)
        for name in ("container-stats", "pod-stats"):
            values[f"{name}-p90"] = [percentile(values[name], 0.9)]
        values["idle-cpu"] = [_polled(run, node)]
        for name, found in values.items():
            for value in found if rows else ():
                run.add(name, node.name, value)
            if number == 1 and name in _PLOTS:
                run.grow(_PLOTS[name], node.name, pods, statistics.median(found))


_PLOTS = {
    "memory-pod": "PSS for each pod, MiB",
    "memory-daemon": "PSS of the daemon, MiB",
    "list": "ListContainers, ms",
    "container-stats": "ListContainerStats, ms",
    "pod-stats": "ListPodSandboxStats, ms",
    "idle-cpu": "CPU under polling, %",
}


def _memory(node: Node, pods: int) -> dict[str, list[float]]:
    """criserver's nursery counts to the daemon: there is one for all pods."""
    helpers = {pid: memory(pid) for pid in node.helpers()}
    nursery = helpers.pop(min(helpers)) if isinstance(node, Criserver) else 0.0
    daemon = memory(node.process.pid) + nursery
    return {"memory-pod": [sum(helpers.values()) / pods], "memory-daemon": [daemon]}


def _calls(run: Run, call: Callable[..., Any]) -> list[float]:
    """CPU figures are computed anew once a second; the call after a pause is among those that are counted."""
    time.sleep(1)
    return [timed(call)[1] for _ in range(run.sizes.calls)]


def _polled(run: Run, node: Node) -> float:
    """Percent of a core that the runtime takes while it is asked as a kubelet asks.

    Every second: the lists of the kubelet's PLEG. Every five: Status. Every ten: images' space and statistics.
    """
    client, pids = node.client, [node.process.pid, *node.helpers()]
    began, used = time.monotonic(), on_cpu(pids)
    second = 0
    while second < run.sizes.polling:
        client.ListPodSandbox()
        client.ListContainers()
        if second % 5 == 0:
            client.Status()
        if second % 10 == 0:
            client.ImageFsInfo()
            client.ListImages()
            client.ListPodSandboxStats()
            client.ListContainerStats()
        second += 1
        time.sleep(max(0.0, began + second - time.monotonic()))
    return (on_cpu(pids) - used) / (time.monotonic() - began) * 100


def _restarts(run: Run, nodes: list[Node], pods: int, *, row: bool) -> None:
    for number, node in run.turns(nodes, run.sizes.rounds if row else 1):
        node.stop()
        seconds = node.start()
        count = len(node.client.ListContainers().containers)
        if count != pods:
            raise RuntimeError(f"{node.name} has {count} containers after a restart, not {pods}")
        if row:
            run.add("restart", node.name, seconds)
        if number == 1:
            run.grow("restart until Version answers, s", node.name, pods, seconds)
