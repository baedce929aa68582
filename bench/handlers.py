"""What the same pod costs under each kind of shim: ours with runc, a shim of containerd's kind here, and containerd.

    python bench/handlers.py [--rounds N] [--pods M] [--shim PROGRAM] [--containerd PATH]

PROGRAM is io.containerd.runc.v2 by default, which is containerd-shim-runc-v2 on PATH. README.md in this directory says
what each row means.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

from node import Containerd, Criserver, Node, build_images, command_line, descendants, memory, scratch

CALLS = ("RunPodSandbox", "CreateContainer", "StartContainer", "ExecSync of true", "StopContainer", "all of a pod")
PROCESSES, MEMORY = "processes per pod", "memory (PSS) of those per pod, MiB"
# Seconds between two pods: what one contender still does in the background is not to fall into the other's time.
REST = 0.1
SETTLES = 2.0


class Shimmed(Criserver):
    """This tree's daemon, whose handler is a shim of containerd's kind."""

    name = "criserver-shim"

    def __init__(self, scratch: str, number: int, shim: str) -> None:
        self._shim = shim
        super().__init__(scratch, number)

    def configuration(self) -> str:
        return super().configuration() + f'[runtimes.runc]\nshim = "{self._shim}"\n'

    def helpers(self) -> list[int]:
        """Our shims, and those of containerd's kind."""
        below = descendants(os.getpid())
        bundles = f"{self.state}/containers/".encode()
        return super().helpers() + [
            pid for pid in below if bundles in (words := command_line(pid)) and b"shim" in words
        ]


def life(node: Node, name: str) -> dict[str, float]:
    """One pod with a container, from beginning to end: milliseconds by row."""
    client, config = node.client, node.pod(name)
    took: dict[str, float] = {}

    def timed(row: str, call: Any, **fields: Any) -> Any:
        began = time.monotonic()
        answer = call(**fields)
        took[row] = (time.monotonic() - began) * 1000
        return answer

    run, create, start, run_command, stop, every = CALLS
    pod = timed(run, client.RunPodSandbox, config=config).pod_sandbox_id
    container = timed(
        create, client.CreateContainer, pod_sandbox_id=pod, config=node.container("main"), sandbox_config=config
    ).container_id
    timed(start, client.StartContainer, container_id=container)
    timed(run_command, client.ExecSync, container_id=container, cmd=["true"], timeout=30)
    timed(stop, client.StopContainer, container_id=container, timeout=0)
    timed("StopPodSandbox", client.StopPodSandbox, pod_sandbox_id=pod)
    timed("RemovePodSandbox", client.RemovePodSandbox, pod_sandbox_id=pod)
    took[every] = sum(took.values()) - took[run_command]
    return {row: took[row] for row in CALLS}


def standing(node: Node, pods: int) -> dict[str, float]:
    """The processes beside the daemon and the containers, and their memory, for each of several pods."""
    for number in range(pods):
        config = node.pod(f"standing{number}")
        node.run(node.client.RunPodSandbox(config=config).pod_sandbox_id, config, "main")
    time.sleep(SETTLES)
    helpers = node.helpers()
    return {PROCESSES: len(helpers) / pods, MEMORY: sum(map(memory, helpers)) / pods}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Samples by row and contender. Each in turn, round after round; the first round is not counted."""
    rows: dict[str, dict[str, list[float]]] = {}
    with scratch() as base:
        archives = build_images(base)
        nodes: list[Node] = [
            Criserver(base, 1),
            Shimmed(base, 2, options.shim),
            Containerd(base, 3, options.containerd),
        ]
        with nodes[0], nodes[1], nodes[2]:
            for node in nodes:
                for archive in archives:
                    node.load(archive)
                node.await_images()
            for number in range(options.rounds + 1):
                for node in nodes if number % 2 else nodes[::-1]:
                    for row, value in life(node, f"pod{number}").items():
                        if number:
                            rows.setdefault(row, {}).setdefault(node.name, []).append(value)
                    time.sleep(REST)
            for node in nodes:
                for row, value in standing(node, options.pods).items():
                    rows.setdefault(row, {}).setdefault(node.name, []).append(value)
    return rows


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Medians with minimum and maximum; times in milliseconds."""
    names = list(next(iter(rows.values())))
    names.sort(key=("criserver", "criserver-shim", "containerd").index)
    lines = [f"{'median (min-max), ms':36}" + "".join(f"{name:>26}" for name in names)]
    for row, found in rows.items():
        cells = []
        for name in names:
            values = found[name]
            spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.1f}{spread}")
        lines.append(f"{row:36}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure handlers of both kinds, and containerd, side by side.")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pods that each makes in turn (20)")
    parser.add_argument("--pods", type=int, default=10, metavar="M", help="pods for the memory (10)")
    parser.add_argument(
        "--shim", default="io.containerd.runc.v2", metavar="PROGRAM", help="the shim of containerd's kind"
    )
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    options = parser.parse_args()
    print(f"cores: {os.cpu_count()}, load: {os.getloadavg()[0]:.1f}")
    try:
        print(table(measure(options)))
    except RuntimeError as e:
        sys.exit(f"handlers.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
