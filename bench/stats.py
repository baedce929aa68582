"""What the kubelet's statistics calls cost on a node of 60 containers, and with ten of its shims stopped.

python bench/stats.py [--pods N] [--calls N]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

from node import Criserver, build_images, scratch

CONTAINERS_PER_POD = 3
STOPPED = 10
# Figures of CPU use are reckoned anew once a second; the calls between are what is measured most.
WARM_UP = 3


def shims(node: Criserver) -> list[int]:
    """The PIDs of the shims, which live in their containers' directories; the nursery does not."""
    return [pid for pid in node.helpers() if os.readlink(f"/proc/{pid}/cwd").startswith(f"{node.state}/containers/")]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process (proc(5), stat fields 14 and 15)."""
    with open(f"/proc/{pid}/stat") as f:
        user, system = f.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(node: Criserver, call: Callable[..., Any], calls: int) -> tuple[float, float, float, int]:
    """Median and slowest call in milliseconds, the daemon's CPU time a call in ms, and the answer's size."""
    for _ in range(WARM_UP):
        size = call().ByteSize()
    times, used = [], cpu_seconds(node.process.pid)
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    used = cpu_seconds(node.process.pid) - used
    return statistics.median(times), max(times), used / calls * 1000, size


def report(node: Criserver, title: str, calls: int) -> None:
    """A line for each call."""
    client = node.client
    print(f"{title:<34}{'median ms':>10}{'max ms':>9}{'CPU ms':>9}{'bytes':>9}")
    for name in ("ListContainerStats", "ListPodSandboxStats", "ListPodSandboxMetrics", "ListContainers"):
        median, slowest, used, size = measure(node, getattr(client, name), calls)
        print(f"  {name:<32}{median:>10.2f}{slowest:>9.2f}{used:>9.2f}{size:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=20, help="pods of three containers (default %(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="calls of each kind (default %(default)s)")
    options = parser.parse_args()
    with scratch() as base, Criserver(base, 1) as node:
        for archive in build_images(base):
            node.load(archive)
        node.await_images()
        for number in range(options.pods):
            config = node.pod(f"pod{number}")
            pod = node.client.RunPodSandbox(config=config).pod_sandbox_id
            for name in range(CONTAINERS_PER_POD):
                node.run(pod, config, f"c{name}")
        running = options.pods * CONTAINERS_PER_POD
        time.sleep(2)
        report(node, f"{running} containers", options.calls)
        stopped = shims(node)[:STOPPED]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            report(node, f"{running} containers, {len(stopped)} shims stopped", options.calls)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
