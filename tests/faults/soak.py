"""``python -m tests.faults.soak MINUTES``: pods live and die beside faults of every kind. ``make soak`` runs it.

Eight workers each make one pod after the other and call again as a kubelet does, until each call has succeeded. Another
pulls an image and removes it. The daemon is killed every 20 s. Every few seconds there is one more fault for a second
or two: see :class:`tests.faults.troubles.Troubles`.

What a call has acknowledged must be there: a pod that is ready, a container that runs. At the end all pods are removed,
and nothing may be left. ``--plot FILE`` draws the daemon's memory, descriptors and threads as SVG.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.faults.matrix import left_on
from tests.faults.operations import archives
from tests.faults.troubles import Troubles, soak_node
from tests.support.fixtures import import_image
from tests.support.imagebuilder import build_image
from tests.support.line_plot import Panel, plot
from tests.support.node import Client, Node
from tests.support.registry import Registry
from tests.support.waiting import SLOWNESS

WORKERS = 8
KILL_EVERY = 20.0
# How long a kubelet may have to call again. Longer is a failure.
PATIENCE = 120.0
_PAUSE = 0.3


class Soak:
    """What the workers have in common: the counts, and when to end."""

    def __init__(self, node: Node, troubles: Troubles) -> None:
        self.node, self.troubles = node, troubles
        self.ending = threading.Event()
        self.counts = Counter[str]()
        self.codes = Counter[str]()
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fail(self, words: str) -> None:
        with self._lock:
            self.failures.append(f"{self.troubles.seconds():.0f} s: {words}")
            print(self.failures[-1], flush=True)

    def refused(self, call: str, error: Exception) -> None:
        """A call that failed, and is made again."""
        code = error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__
        with self._lock:
            self.codes[code] += 1
        if code in ("INTERNAL", "UNKNOWN"):
            with self._lock:
                self.codes[f"{code}: {call}: {str(getattr(error, 'details', str)())[:150]}"] += 1


class Worker(threading.Thread):
    """One kubelet's worth of pods, one after the other."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"worker {number}")
        self.soak, self.number = soak, number
        self.client = Client(soak.node.socket)
        self.random = random.Random(number)

    def run(self) -> None:
        count = 0
        while not self.soak.ending.is_set():
            try:
                self._life(f"w{self.number}-{count}")
                self.soak.count("pods")
            except Exception as e:
                self.soak.fail(f"{self.name}, pod {count}: {type(e).__name__}: {e}")
            count += 1

    def again(self, what: str, call: Callable[[], Any]) -> Any:
        """Make a call until it succeeds."""
        deadline = time.monotonic() + PATIENCE * SLOWNESS
        while True:
            try:
                return call()
            except grpc.RpcError as e:
                self.soak.refused(what, e)
                if time.monotonic() > deadline:
                    raise AssertionError(f"{what} has not succeeded: {e.code()}: {e.details()}") from None
            time.sleep(_PAUSE)

    def _life(self, name: str) -> None:
        client = self.client
        pod = self.again("RunPodSandbox", lambda: self._pod(name))
        self.soak.node.pods.add(pod)
        container = self.again("StartContainer", lambda: self._container(pod))
        self.again("ExecSync", lambda: self._exec(container))
        time.sleep(self.random.random() * 0.5)
        self._look(pod, container)
        self.again("StopContainer", lambda: client.StopContainer(container_id=container, timeout=1))
        if self.again("ContainerStatus", lambda: client.ContainerStatus(container_id=container)).status.finished_at:
            self.soak.count("stopped")
        self._remove(pod)
        for other in self._pods(name):
            self._remove(other.id)

    def _remove(self, pod: str) -> None:
        self.again("StopPodSandbox", lambda: self.client.StopPodSandbox(pod_sandbox_id=pod))
        self.again("RemovePodSandbox", lambda: self.client.RemovePodSandbox(pod_sandbox_id=pod))

    def _pods(self, name: str) -> list[cri.PodSandbox]:
        found = self.again("ListPodSandbox", lambda: self.client.ListPodSandbox(filter={"label_selector": {"w": name}}))
        return list(found.items)

    def _pod(self, name: str) -> str:
        listed = self._pods(name)
        for pod in listed:
            if pod.state == cri.SANDBOX_READY:
                return str(pod.id)
            self.client.StopPodSandbox(pod_sandbox_id=pod.id)
        attempt = max((pod.metadata.attempt + 1 for pod in listed), default=0)
        config = self.soak.node.pod(name, attempt, labels={"w": name})
        return str(self.client.RunPodSandbox(config=config).pod_sandbox_id)

    def _container(self, pod: str) -> str:
        """A container that runs, by as many calls as it takes."""
        listed = list(self.client.ListContainers(filter={"pod_sandbox_id": pod}).containers)
        for found in listed:
            if found.state == cri.CONTAINER_RUNNING:
                return str(found.id)
        created = [found.id for found in listed if found.state == cri.CONTAINER_CREATED]
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="c", attempt=len(listed)),
            image=cri.ImageSpec(image="localhost/busybox:latest"),
            command=["sleep", "100000"],
            log_path=f"c{len(listed)}.log",
        )
        container = (
            created[0] if created else self.client.CreateContainer(pod_sandbox_id=pod, config=config).container_id
        )
        self.client.StartContainer(container_id=container)
        return str(container)

    def _exec(self, container: str) -> None:
        if container in self.soak.troubles.without_shim:
            return  # nothing can be run in it any more
        done = self.client.ExecSync(container_id=container, cmd=["true"], timeout=10)
        if done.exit_code:
            self.soak.fail(f"exec of true ended with {done.exit_code}: {done.stderr.decode()[:200]}")

    def _look(self, pod: str, container: str) -> None:
        """What was acknowledged is there."""
        status = self.again("PodSandboxStatus", lambda: self._status(pod, container))
        if status != (cri.SANDBOX_READY, cri.CONTAINER_RUNNING):
            self.soak.count("lost")
            self.soak.fail(f"lost: pod {pod} and container {container} are {status}")
        self.soak.count("acknowledged")

    def _status(self, pod: str, container: str) -> tuple[int, int] | str:
        try:
            found = self.client.PodSandboxStatus(pod_sandbox_id=pod).status.state
            return found, self.client.ContainerStatus(container_id=container).status.state
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.NOT_FOUND:
                return "not found"
            raise


class Puller(Worker):
    """Pulls an image of some MiB and removes it."""

    def __init__(self, soak: Soak, image: str) -> None:
        super().__init__(soak, WORKERS)
        self.image = cri.ImageSpec(image=image)

    def _life(self, name: str) -> None:
        self.again("PullImage", lambda: self.client.PullImage(image=self.image))
        self.again("RemoveImage", lambda: self.client.RemoveImage(image=self.image))
        self.soak.count("pulls")
        self.soak.counts["pods"] -= 1


class Sampler(threading.Thread):
    """The daemon's memory, descriptors and threads, once a second."""

    def __init__(self, soak: Soak) -> None:
        super().__init__(name="sampler")
        self.soak = soak
        self.times: list[float] = []
        self.rows: list[tuple[float, float, float]] = []

    def run(self) -> None:
        while not self.soak.ending.wait(1):
            process = self.soak.node.process
            with contextlib.suppress(OSError):
                assert process is not None
                with open(f"/proc/{process.pid}/status") as f:
                    status = dict(line.rstrip("\n").split(":", 1) for line in f)
                found = len(os.listdir(f"/proc/{process.pid}/fd"))
                if "VmRSS" in status:
                    row = (int(status["VmRSS"].split()[0]) / 1024, found, int(status["Threads"]))
                    self.times.append(self.soak.troubles.seconds())
                    self.rows.append(row)

    def drawing(self, kills: list[float]) -> str:
        memory, descriptors, threads = zip(*self.rows, strict=True)
        panels = (
            Panel("memory of the daemon (RSS), MiB", memory),
            Panel("descriptors of the daemon", descriptors),
            Panel("threads of the daemon", threads),
        )
        return plot(self.times, panels, kills)


def soak(node: Node, minutes: float, image: str, seed: int, *, troubled: bool) -> tuple[Soak, Sampler, Troubles]:
    """Workers and faults side by side, for so long."""
    troubles = Troubles(node, random.Random(seed))
    state = Soak(node, troubles)
    sampler = Sampler(state)
    workers = [Worker(state, number) for number in range(WORKERS)] + [Puller(state, image)]
    for thread in (sampler, *workers):
        thread.start()
    try:
        while (left := minutes * 60 - troubles.seconds()) > 0:
            print(f"{troubles.seconds():.0f} s: {dict(state.counts)}", file=sys.stderr, flush=True)
            if troubled:
                troubles.next(min(KILL_EVERY, left))
            else:
                time.sleep(min(KILL_EVERY, left))
    except Exception as e:
        state.fail(f"the daemon: {e}")
    finally:
        state.ending.set()
        for thread in workers:
            thread.join()
        sampler.join()
    return state, sampler, troubles


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--calm", action="store_true", help="without faults and kills")
    parser.add_argument("--watch", metavar="LOG", help="write down there what blocks the daemon's event loop")
    parser.add_argument("--log", metavar="FILE", help="keep the daemon's log there")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as scratch,
        contextlib.closing(soak_node(scratch, options.watch)) as node,
    ):
        base, _ = archives(scratch)
        node.start()
        import_image(node, base)
        registry = Registry(scratch)
        try:
            layers = [{f"f{n}/{i}": random.Random(i).randbytes(20000) for i in range(200)} for n in range(3)]
            image = registry.push(build_image(layers), "soak:latest")
            before = set(left_on(node))
            state, sampler, troubles = soak(node, options.minutes, image, options.seed, troubled=not options.calm)
            node.client = Client(node.socket)
            node.remove_pods()
            deadline = time.monotonic() + 20 * SLOWNESS
            while (left := set(left_on(node)) - before) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            registry.close()
            if options.log:
                shutil.copy(f"{node.base}/daemon.log", options.log)
        print(f"seed {options.seed}, {troubles.seconds():.0f} s; faults: {dict(troubles.counts)}")
        print(f"counts: {dict(state.counts)}")
        print("calls that were made again:", *(f"  {n} {code}" for code, n in state.codes.most_common()), sep="\n")
        print(f"acknowledged and lost: {state.counts['lost']}; left: {len(left)}; failures: {len(state.failures)}")
        complaints = node.complaints()
        print(*sorted(left), *complaints, *state.failures, sep="\n")
        if options.plot:
            with open(options.plot, "w") as f:
                f.write(sampler.drawing(troubles.kills))
    return int(bool(state.failures or left or complaints))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main())
