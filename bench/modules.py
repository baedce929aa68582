"""Where the memory of an idle daemon goes, module by module.

    python -m bench.modules [--runs N]

README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import isolation
from bench.nodes import PYTHON, Criserver
from bench.processes import anonymous_memory
from bench.run import Run, Sizes

_START, _REST = "the interpreter", "serving: threads, gRPC's server, SQLite, caches"
_SMALL = 100  # KiB: packages with less are one row
_SETTLES = 3.0
_TOGETHER = {
    **dict.fromkeys(("attr", "attrs", "jsonschema", "referencing", "rpds", "jsonschema_specifications"), "jsonschema"),
    **dict.fromkeys(("h11", "wsproto"), "h11, wsproto"),
    "google": "protobuf",
}


def group(module: str) -> str:
    """The row that a module belongs to."""
    first, _, rest = module.partition(".")
    if first == "criserver":
        room, _, inside = rest.partition(".")
        return f"criserver.{room}" if inside else "criserver"
    if first in sys.stdlib_module_names:
        return first if first in ("asyncio", "_ssl", "ssl", "typing") else "standard library, other modules"
    return _TOGETHER.get(first, first)


def rows(found: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each row of several runs, in KiB, the largest first."""
    sums: dict[str, list[float]] = {_START: [run["started"] for run in found]}
    for number, run in enumerate(found):
        for module, value in run["own"].items():
            sums.setdefault(group(module), [0.0] * len(found))[number] += value
    medians = {name: statistics.median(values) for name, values in sums.items()}
    small = [name for name, value in medians.items() if value < _SMALL]
    medians["other modules"] = sum(medians.pop(name) for name in small)
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def _run(*options: str) -> dict[str, Any]:
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0", "PYTHONHASHSEED": "0"}
    words = [PYTHON, *options, "-m", "bench.imports"]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, env=environment).stdout)
    return found


def measure(options: argparse.Namespace) -> str:
    """The table of both measures. What is not of an import is the difference to an idle daemon."""
    with (
        isolation.scratch() as base,
        Run(base, "", Sizes()).place() as (directory, disk),
        Criserver(directory, disk, 1) as node,
    ):
        time.sleep(_SETTLES)
        idle = anonymous_memory(node.process.pid) * 1024
    objects = rows([_run("-X", "tracemalloc")])
    memory = rows([_run() for _ in range(options.runs)])
    memory[_REST] = idle - sum(memory.values())
    made = ["| | anonymous memory, KiB | Python's objects, KiB |", "|---|---|---|"]
    for name, value in [*memory.items(), ("an idle daemon", idle)]:
        made.append(f"| {name} | {value:,.0f} | {f'{objects[name]:,.0f}' if name in objects else ''} |")
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.modules", description="Measure the memory of an idle daemon, module by module."
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs whose median is taken (%(default)s)")
    isolation.run("bench.modules", parser, measure)


if __name__ == "__main__":
    main()
