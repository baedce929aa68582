"""The same daemon by several Python interpreters, or by one with several settings, in turn.

    python -m bench.interpreters [--rounds N] COMMAND...

A COMMAND is an interpreter with options, such as "/opt/python3.13/bin/python -X no_debug_ranges", or "env
PYTHONMALLOC=malloc python3". It needs the libraries of requirements.lock. README.md says what each row means.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import time

from bench import isolation
from bench.images import build_images
from bench.lives import Pod
from bench.nodes import Criserver
from bench.processes import anonymous_memory, command_line, descendants, on_cpu
from bench.run import Run, Sizes

_PODS = 3
_SETTLES = 1.5
Found = dict[str, list[float]]


class Interpreted(Criserver):
    """This tree's daemon by one interpreter."""

    def __init__(self, base: str, disk: str, number: int, words: list[str]) -> None:
        self.name, self._words = f"python{number}", words
        super().__init__(base, disk, number)
        self.compiled(words)

    def command(self) -> list[str]:
        return [*self._words, "-m", "criserver", "serve", "--config", self.config]

    def nursery(self) -> int:
        """The PID of the daemon's nursery."""
        return next(p for p in descendants(self.process.pid) if b"shims.nursery_process" in command_line(p))


def turn(node: Interpreted, name: str) -> dict[str, float]:
    """One start, and the life of some pods: the figure of each row."""
    node.stop()
    node.start()
    start = on_cpu([node.process.pid])
    time.sleep(_SETTLES)
    idle, nursery = anonymous_memory(node.process.pid), anonymous_memory(node.nursery())
    before = on_cpu([node.process.pid])
    for number in range(_PODS):
        pod = Pod(node, f"{name}-{number}")
        pod.up()
        pod.exec()
        pod.down()
    life = (on_cpu([node.process.pid]) - before) * 1000 / _PODS
    return {
        "idle daemon, MiB": idle,
        "idle nursery, MiB": nursery,
        f"daemon after {_PODS} pods, MiB": anonymous_memory(node.process.pid),
        "CPU of a start, s": start,
        "CPU of a pod's life, ms": life,
    }


def measure(options: argparse.Namespace) -> str:
    """The table, after a round that is not counted."""
    found: dict[str, Found] = {command: {} for command in options.commands}
    run = Run("", "", Sizes(rounds=options.rounds))
    with isolation.scratch() as run.base, run.place() as (directory, disk), contextlib.ExitStack() as stack:
        archives = build_images(directory)
        nodes = []
        for number, command in enumerate(options.commands):
            nodes.append(stack.enter_context(Interpreted(directory, disk, number, shlex.split(command))))
            nodes[-1].load_images(archives)
        for number, (command, node) in run.turns(list(zip(options.commands, nodes, strict=True)), warm_up=True):
            for row, value in turn(node, f"r{number}").items():
                if number:
                    found[command].setdefault(row, []).append(value)
    return table(found)


def table(found: dict[str, Found]) -> str:
    """A paragraph for each command: medians, and in brackets minima and maxima."""
    lines = []
    for command, rows in found.items():
        lines.append(command)
        for row, values in rows.items():
            lines.append(f"    {row:28}{statistics.median(values):8.2f} ({min(values):.2f}-{max(values):.2f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.interpreters", description="Measure the daemon by several Python interpreters."
    )
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="an interpreter, with options")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="rounds (%(default)s)")
    isolation.run("bench.interpreters", parser, measure)


if __name__ == "__main__":
    main()
