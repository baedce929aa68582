"""What holds the daemon's event loop up while eight workers make and remove pods, and while an image is pulled.

    python -m bench.loop [--seconds N] [--pulls]

It prints how long a kubelet's short calls took meanwhile, and each time that the loop was late by more than 30 ms, with
where the main thread was then. README.md in this directory says what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from typing import Any

from bench import isolation
from bench.images import build_images
from bench.measures.load import Beside, beside_workers, push_large
from bench.nodes import PYTHON, Criserver
from bench.registry import Registry
from bench.run import Run, Sizes
from bench.table import percentile

_SHOWN = 5  # frames of a stack


class Watched(Criserver):
    """This tree's daemon, with its loop watched."""

    def command(self) -> list[str]:
        return [PYTHON, "-m", "bench.watched", f"{self.base}/late.json", "serve", "--config", self.config]

    def late(self) -> list[dict[str, Any]]:
        """Each time that the loop was late so far."""
        with open(f"{self.base}/late.json") as f:
            return [json.loads(line) for line in f]


def measure(options: argparse.Namespace) -> str:
    """The report."""
    sizes = Sizes()
    run = Run("", "", sizes)
    with isolation.scratch() as run.base, run.place() as (directory, disk), contextlib.ExitStack() as stack:
        image = ""
        if options.pulls:
            image = push_large(stack.enter_context(Registry(f"{directory}/registry")), sizes.pull_megabytes)
        node = stack.enter_context(Watched(directory, disk, 1))
        node.load_images(build_images(directory))
        before = len(node.late())
        found = beside_workers(node, "", options.seconds, image)
        return report(found, node.late()[before:])


def report(found: Beside, late: list[dict[str, Any]]) -> str:
    """Lines for people: the calls, then the times that the loop was late, the longest first."""
    lines = [f"{found.pods} pods made and removed, {found.pulls} pulls"]
    for call, values in found.calls.items():
        numbers = (statistics.median(values), percentile(values, 0.99), max(values))
        lines.append(f"{call}: median {numbers[0]:.1f}, p99 {numbers[1]:.1f}, longest {numbers[2]:.1f} ms")
    lines.append(f"the loop was late {len(late)} times")
    for one in sorted(late, key=lambda one: -one["ms"]):
        lines.append(f"{one['ms']} ms: {one['cpu_ms']} ms of work, {one['turn_ms']} ms until it had a processor")
        lines += [f"    {frame}" for frame in one["stack"][:_SHOWN]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loop", description="Find what holds the daemon's event loop up beside eight workers."
    )
    parser.add_argument("--seconds", type=float, default=90.0, metavar="N", help="how long (%(default)s)")
    parser.add_argument("--pulls", action="store_true", help="pull an image again and again meanwhile")
    isolation.run("bench.loop", parser, measure)


if __name__ == "__main__":
    main()
