"""One run: the contenders, their order, and the samples."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.images import build_images
from bench.isolation import disk
from bench.lives import Add, BarePod, Pod
from bench.nodes import Containerd, Criserver, Node
from bench.table import FLOOR

# Seconds between two turns. The background work of one contender is then not in the time of the next.
REST = 0.1


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 5
    lives: int = 4  # pods of each contender in a round
    wide_pods: int = 24
    wide_execs: int = 120
    churn: float = 10.0  # seconds
    polling: float = 10.0  # seconds
    calls: int = 20  # of each statistics call in a round
    steps: tuple[int, ...] = (10, 60, 100, 200)  # pods; growth is drawn with these
    log_lines: int = 3_000_000
    pull_megabytes: int = 420
    pull_files: int = 82_000
    stream_megabytes: int = 500
    stalled: int = 10


QUICK = Sizes(1, 1, 8, 16, 1.5, 2.0, 2, (2, 4), 100_000, 8, 400, 20, 2)


@dataclass
class Run:
    """The results so far, and what is needed to get more."""

    base: str
    containerd: str
    sizes: Sizes
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # By measure and contender: pairs of pods and value.
    growth: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    runtimes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _places: int = 0

    def add(self, row: str, who: str, value: float) -> None:
        """One sample."""
        self.samples.setdefault(row, {}).setdefault(who, []).append(value)

    def adder(self, who: str) -> Add:
        """The way for calls that name a row and a value."""
        return lambda row, value: self.add(row, who, value)

    def grow(self, measure: str, who: str, pods: int, value: float) -> None:
        """One point of a plot."""
        self.growth.setdefault(measure, {}).setdefault(who, []).append((pods, value))

    @contextlib.contextmanager
    def place(self) -> Iterator[tuple[str, str]]:
        """A directory in memory, and an empty disk."""
        self._places += 1
        directory = f"{self.base}/{self._places}"
        os.makedirs(directory)
        with disk(directory) as root:
            yield directory, root

    @contextlib.contextmanager
    def nodes(self) -> Iterator[tuple[Node, Node]]:
        """Both daemons, with the same images and on the same disk."""
        with self.place() as (directory, root):
            archives = build_images(directory)
            pair = (Criserver(directory, root, 1), Containerd(directory, root, 2, self.containerd))
            with pair[0], pair[1]:
                for node in pair:
                    node.load_images(archives)
                self.runtimes = [node.version() for node in pair]
                yield pair

    def pod(self, who: Node | None, name: str, **options: Any) -> Pod | BarePod:
        """A contender's pod; without a node it is made by hand."""
        return Pod(who, name, **options) if who else BarePod(self.base, name)

    def turns(self, contenders: list[Any], rounds: int = 0, *, warm_up: bool = False) -> Iterator[tuple[int, Any]]:
        """Number of the round and contender. The order changes each round. Round 0 is a warm-up, if one is wanted."""
        rounds = rounds or self.sizes.rounds
        for number in range(0 if warm_up else 1, rounds + 1):
            print(f"    round {number} of {rounds}", file=sys.stderr)
            for contender in contenders if number % 2 else contenders[::-1]:
                yield number, contender
                time.sleep(REST)


def name_of(node: Node | None) -> str:
    """The contender's name in the tables."""
    return node.name if node else FLOOR


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    runc = subprocess.run(["runc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "runc": runc.removeprefix("runc version "),
        "load before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }
