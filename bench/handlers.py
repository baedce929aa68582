"""What the same pod costs under each kind of shim: ours with runc, a shim of containerd's kind here, and containerd.

    python -m bench.handlers [--rounds N] [--pods M] [--shim PROGRAM] [--containerd PATH]

PROGRAM is io.containerd.runc.v2 by default, which is containerd-shim-runc-v2 on PATH. README.md in this directory says
what each row means.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

from bench import isolation
from bench.images import build_images
from bench.lives import Pod
from bench.nodes import Containerd, Criserver, Node
from bench.processes import matching, memory
from bench.run import Run, Sizes

TIMES = ("RunPodSandbox", "CreateContainer", "StartContainer", "exec", "StopContainer", "pod-up", "pod-down")
PROCESSES, MEMORY = "processes for each pod", "memory (PSS) of those, MiB"
# Seconds between two pods: what one contender still does in the background is not to fall into the other's time.
REST = 0.1
SETTLES = 2.0


class Shimmed(Criserver):
    """This tree's daemon, whose handler is a shim of containerd's kind."""

    name = "criserver-shim"

    def __init__(self, base: str, disk: str, number: int, shim: str) -> None:
        self._shim = shim
        super().__init__(base, disk, number)

    def configuration(self) -> str:
        return super().configuration() + f'[runtimes.runc]\nshim = "{self._shim}"\n'

    def helpers(self) -> list[int]:
        """Our shims, and those of containerd's kind, which run in the directory of their container."""
        found = super().helpers()
        for pid in matching(b"-namespace"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd").startswith(self.state):
                    found.append(pid)
        return found


def life(node: Node, name: str) -> dict[str, float]:
    """One pod with a container, from beginning to end: milliseconds by row."""
    took: dict[str, float] = {}
    pod = Pod(node, name)
    pod.up(took.__setitem__)
    pod.exec(took.__setitem__)
    pod.down(took.__setitem__)
    return {row: took[row] for row in TIMES}


def standing(node: Node, pods: int) -> dict[str, float]:
    """The processes beside the daemon and the containers, and their memory, for each of several pods."""
    for number in range(pods):
        Pod(node, f"standing{number}").up()
    time.sleep(SETTLES)
    helpers = node.helpers()
    return {PROCESSES: len(helpers) / pods, MEMORY: sum(map(memory, helpers)) / pods}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Samples by row and contender. Each in turn, round after round; the first round is not counted."""
    rows: dict[str, dict[str, list[float]]] = {}
    with isolation.scratch() as base, Run(base, "", Sizes()).place() as (directory, disk):
        archives = build_images(directory)
        nodes: list[Node] = [
            Criserver(directory, disk, 1),
            Shimmed(directory, disk, 2, options.shim),
            Containerd(directory, disk, 3, options.containerd),
        ]
        with nodes[0], nodes[1], nodes[2]:
            for node in nodes:
                node.load_images(archives)
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
    parser = argparse.ArgumentParser(
        prog="python -m bench.handlers", description="Measure handlers of both kinds, and containerd, side by side."
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pods that each makes in turn (20)")
    parser.add_argument("--pods", type=int, default=10, metavar="M", help="pods for the memory (10)")
    parser.add_argument(
        "--shim", default="io.containerd.runc.v2", metavar="PROGRAM", help="the shim of containerd's kind"
    )
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    isolation.run("bench.handlers", parser, lambda options: table(measure(options)))


if __name__ == "__main__":
    main()
