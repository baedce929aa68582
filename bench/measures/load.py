"""Eight workers at a time: how much they get done, and how long a kubelet's other calls take beside them."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from bench.lives import Pod, timed
from bench.nodes import Client, Node
from bench.run import Run, name_of
from bench.table import percentile

_WIDTH = 8
_PAUSE = 0.01  # seconds between two calls of the prober


def measure(run: Run) -> None:
    """Pods up a second, execs a second, and the tail of short calls."""
    with run.nodes() as nodes:
        for number, node in run.turns([None, *nodes], warm_up=True):
            _rates(run, node, number)
        for number, node in run.turns(list(nodes)):
            for row, values in beside_workers(run, node, number).items():
                run.add(row, node.name, percentile(values, 0.99))


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


def beside_workers(run: Run, node: Node, number: int) -> dict[str, list[float]]:
    """Milliseconds of each call of a prober, by row, while eight workers make and remove pods.

    The prober is a process of its own: threads of the workers do not delay it.
    """
    standing = Pod(node, f"standing{number}")
    standing.up()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    prober = context.Process(target=_probe, args=(node.socket, standing.container, theirs))
    prober.start()
    ours.recv()  # it is ready
    until = time.monotonic() + run.sizes.churn
    ours.send(until)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for life in itertools.count():
                if time.monotonic() > until:
                    break
                pod = Pod(node, f"churn{number}-{worker}-{life}")
                pod.up()
                pod.down()
        except BaseException as e:
            failures.append(e)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(_WIDTH)]
    for thread in workers:
        thread.start()
    found: dict[str, list[float]] = ours.recv()
    prober.join()
    for thread in workers:
        thread.join()
    if failures:
        raise RuntimeError(f"{node.name}: a worker failed") from failures[0]
    standing.down()
    return found


def _probe(socket: str, container: str, parent: Connection) -> None:
    client = Client(socket)
    client.Version()
    parent.send("ready")
    until = parent.recv()
    found: dict[str, list[float]] = {"status-p99": [], "list-p99": [], "exec-p99": []}
    while time.monotonic() < until:
        found["status-p99"].append(timed(client.Status)[1])
        time.sleep(_PAUSE)
        found["list-p99"].append(timed(client.ListContainers)[1])
        time.sleep(_PAUSE)
        if len(found["status-p99"]) % 4 == 1:
            found["exec-p99"].append(timed(client.ExecSync, container_id=container, cmd=["true"], timeout=30)[1])
    parent.send(found)
