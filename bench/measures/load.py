"""Eight workers at a time: how much they get done, and how long a kubelet's other calls take beside them."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.images import GZIP, large_layer
from bench.lives import Pod, timed
from bench.nodes import Client, Node
from bench.registry import Registry
from bench.run import Run, name_of
from bench.table import percentile
from criserver.pb.runtime.v1 import api_pb2 as cri

_WIDTH = 8
_PAUSE = 0.01  # seconds between two calls of the prober
_LAYERS = 4


def measure(run: Run) -> None:
    """Pods up a second, execs a second, and the tail of short calls: beside pods, and beside pods and pulls."""
    with run.nodes() as nodes, run.place() as (directory, _), Registry(f"{directory}/registry") as registry:
        for number, node in run.turns([None, *nodes], warm_up=True):
            _rates(run, node, number)
        for beside, image in (("", ""), ("-pull", push_large(registry, run.sizes.pull_megabytes))):
            for number, node in run.turns(list(nodes)):
                found = beside_workers(node, f"{number}{beside}", run.sizes.churn, image)
                for call, values in found.calls.items():
                    run.add(f"{call}{beside}-p99", node.name, percentile(values, 0.99))


def _rates(run: Run, node: Node | None, number: int) -> None:
    who = name_of(node)
    pods = [run.pod(node, f"wide{number}-{n}") for n in range(run.sizes.wide_pods)]
    up = _wide([pod.up for pod in pods])
    execs = _wide([pod.exec for pod in itertools.islice(itertools.cycle(pods), run.sizes.wide_execs)])
    _wide([pod.down for pod in pods])
    if number:
        run.add("pods-a-second", who, up)
        run.add("execs-a-second", who, execs)


def _wide(calls: list[Callable[[], Any]]) -> float:
    """Calls a second, eight at a time."""
    began = time.monotonic()
    with ThreadPoolExecutor(_WIDTH) as threads:
        for done in [threads.submit(call) for call in calls]:
            done.result()
    return len(calls) / (time.monotonic() - began)


def push_large(registry: Registry, megabytes: int) -> str:
    """Push an image of large files for ``beside_workers``. Its reference."""
    registry.push("large", lambda n: large_layer(n, megabytes // _LAYERS), _LAYERS, *GZIP)
    return f"{registry.address}/large:latest"


@dataclass(frozen=True)
class Beside:
    """What a prober saw beside workers: the milliseconds of its calls, by call; and what the workers did meanwhile."""

    calls: dict[str, list[float]]
    pods: int
    pulls: int


def beside_workers(node: Node, name: str, seconds: float, image: str = "") -> Beside:
    """A kubelet's short calls, while eight workers make and remove pods.

    ``image`` is what a ninth worker pulls and removes meanwhile, again and again; empty for none. The prober is a
    process of its own, so that the workers' threads do not delay it.
    """
    standing = Pod(node, f"standing{name}")
    standing.up()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    prober = context.Process(target=_probe, args=(node.socket, standing.container, theirs))
    prober.start()
    ours.recv()  # it is ready
    until = time.monotonic() + seconds
    ours.send(until)

    def make_pods(worker: int) -> int:
        for life in itertools.count():
            if time.monotonic() > until:
                return life
            pod = Pod(node, f"churn{name}-{worker}-{life}")
            pod.up()
            pod.down()
        return 0

    def pull() -> int:
        spec = cri.ImageSpec(image=image)
        for number in itertools.count():
            if time.monotonic() > until:
                return number
            node.client.PullImage(image=spec)
            node.client.RemoveImage(image=spec)
        return 0

    with ThreadPoolExecutor(_WIDTH + 1) as threads:
        workers = [threads.submit(make_pods, n) for n in range(_WIDTH)]
        puller = threads.submit(pull) if image else None
        calls: dict[str, list[float]] = ours.recv()
    prober.join()
    pods, pulls = sum(worker.result() for worker in workers), puller.result() if puller else 0
    standing.down()
    return Beside(calls, pods, pulls)


def _probe(socket: str, container: str, parent: Connection) -> None:
    client = Client(socket)
    client.Version()
    parent.send("ready")
    until = parent.recv()
    found: dict[str, list[float]] = {"status": [], "list": [], "exec": []}
    while time.monotonic() < until:
        found["status"].append(timed(client.Status)[1])
        time.sleep(_PAUSE)
        found["list"].append(timed(client.ListContainers)[1])
        time.sleep(_PAUSE)
        if len(found["status"]) % 4 == 1:
            found["exec"].append(timed(client.ExecSync, container_id=container, cmd=["true"], timeout=30)[1])
    parent.send(found)
