"""``python -m tests.faults.crowd``: a hundred pods at once, and starts of a daemon that has 200 containers.

With ``--containerd`` the same is measured with the containerd on PATH, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc

from tests.faults.matrix import left_on
from tests.faults.operations import archives
from tests.support.containerd import ContainerdNode
from tests.support.fixtures import import_image
from tests.support.node import Client, Node

AT_ONCE = 100
CONTAINERS = 200
PER_POD = 10
STARTS = 5
# How often a pod that was refused is tried again.
_TRIES = 5


class Most:
    """The largest numbers of the daemon's descriptors, threads and children while a block lasts."""

    def __init__(self, node: Node) -> None:
        assert node.process is not None
        self._pid = node.process.pid
        self.found: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Most:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            with contextlib.suppress(OSError), open(f"/proc/{self._pid}/task/{self._pid}/children") as f:
                now = {
                    "descriptors": len(os.listdir(f"/proc/{self._pid}/fd")),
                    "threads": len(os.listdir(f"/proc/{self._pid}/task")),
                    "children": len(f.read().split()),
                }
                for what, number in now.items():
                    self.found[what] = max(self.found[what], number)


def crowd(node: Node) -> str:
    """A hundred pods with a container each, all at the same time."""
    codes: Counter[str] = Counter()
    times: list[float] = []

    def life(number: int) -> None:
        began = time.monotonic()
        for attempt in range(_TRIES):
            try:
                config = node.pod(f"crowd{number}", attempt)
                pod = node.client.RunPodSandbox(300, config=config).pod_sandbox_id
                node.pods.add(pod)
                node.described[pod] = config
                node.run(pod, "c", ["sleep", "100000"])
            except grpc.RpcError as e:
                codes[e.code().name] += 1
            else:
                times.append(time.monotonic() - began)
                return
        codes["never"] += 1

    began = time.monotonic()
    with Most(node) as most, ThreadPoolExecutor(AT_ONCE) as callers:
        list(callers.map(life, range(AT_ONCE)))
    took = time.monotonic() - began
    return (
        f"{AT_ONCE} pods at once: {len(times)} run after {took:.1f} s, p50 {statistics.median(times):.1f} s, max "
        f"{max(times):.1f} s; refused {dict(codes)}; most at a time {dict(most.found)}"
    )


def starts(node: Node) -> str:
    """SIGKILLs of a daemon with 200 containers, each until Version answers again."""
    for number in range(CONTAINERS // PER_POD):
        pod = node.run_pod(f"full{number}")
        for container in range(PER_POD):
            node.run(pod, f"c{container}", ["sleep", "100000"])
    times, used = [], []
    for _ in range(STARTS):
        assert node.process is not None
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()
        node.client.channel.close()
        began = time.monotonic()
        threading.Thread(target=lambda: node.start(recovered=False)).start()
        while True:
            client = Client(node.socket)
            try:
                client.Version(0.5)
                break
            except grpc.RpcError:
                continue
            finally:
                client.channel.close()
        times.append((time.monotonic() - began) * 1000)
        used.append(_cpu_milliseconds(node.process.pid))
        time.sleep(2)
        assert len(node.client.ListContainers().containers) >= CONTAINERS
    return (
        f"start with {CONTAINERS} containers until Version answers: p50 {statistics.median(times):.0f} ms, max "
        f"{max(times):.0f} ms; CPU time of the daemon until then: p50 {statistics.median(used):.0f} ms"
    )


def _cpu_milliseconds(pid: int) -> float:
    """CPU time of a process (proc(5), /proc/PID/stat fields 14 and 15)."""
    with open(f"/proc/{pid}/stat") as f:
        user, system = f.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * 1000 / os.sysconf("SC_CLK_TCK")


def measure(node: Node, load: str, *, starts_alone: bool) -> None:
    """Both, on one node, or the starts alone."""
    name = "containerd" if isinstance(node, ContainerdNode) else "criserver"
    try:
        node.start()
        if isinstance(node, ContainerdNode):
            node.import_archive(load)
        else:
            import_image(node, load)
        if not starts_alone:
            print(f"{name}: {crowd(node)}", flush=True)
            node.remove_pods()
        print(f"{name}: {starts(node)}", flush=True)
        node.remove_pods()
        if not isinstance(node, ContainerdNode):
            time.sleep(1)
            print(f"{name}: left: {left_on(node)}")
    finally:
        node.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crowd", description=__doc__)
    parser.add_argument("--containerd", action="store_true")
    parser.add_argument("--starts", action="store_true", help="the starts alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, _ = archives(scratch)
        measure(Node(), base, starts_alone=options.starts)
        if options.containerd:
            measure(ContainerdNode(), base, starts_alone=options.starts)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main())
