"""This runtime, containerd and the bare tools beneath both, measured in turn: ``make bench``.

README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from typing import Any

from bench import isolation, table
from bench.pages import write_pages
from bench.run import QUICK, Run, Sizes, machine

_LARGEST_STEP = 500


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rows", default=",".join(table.GROUPS), metavar="GROUPS", help="which groups of rows (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=Sizes.rounds, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="try every row with small sizes; the figures mean nothing")
    parser.add_argument("--growth", action="store_true", help=f"go on to {_LARGEST_STEP} pods")
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    parser.add_argument("--pages", action="store_true", help="write tables and drawings into README.md and docs/")
    parser.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: take the samples of this file")
    options = parser.parse_args(arguments)
    options.groups = options.rows.split(",")
    if unknown := set(options.groups) - set(table.GROUPS):
        parser.error(f"no such group of rows: {', '.join(sorted(unknown))}")
    written = (set(table.GROUPS), {"standing"})
    if options.pages and not options.source and (options.quick or set(options.groups) not in written):
        parser.error("--pages needs a run of all rows, or of those of standing for the growth, without --quick")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the groups one after the other. The document of all results."""
    sizes = QUICK if options.quick else Sizes(rounds=options.rounds)
    if options.growth:
        sizes = dataclasses.replace(sizes, steps=(*sizes.steps, _LARGEST_STEP))
    facts = machine()
    with isolation.scratch() as base:
        run = Run(base, options.containerd, sizes)
        for group in options.groups:
            print(f"{group}:", file=sys.stderr, flush=True)
            began = time.monotonic()
            importlib.import_module(f"bench.measures.{group}").measure(run)
            run.seconds[group] = round(time.monotonic() - began)
    facts |= {"runtimes": run.runtimes, "rounds": sizes.rounds, "seconds": run.seconds}
    facts["load after"] = round(os.getloadavg()[0], 2)
    return {"machine": facts, "samples": run.samples, "growth": run.growth}


def main() -> None:
    arguments = sys.argv[1:]
    inside = arguments[:1] == [isolation.INSIDE]
    options = parse(arguments[1:] if inside else arguments)
    try:
        if not inside and not options.source:
            sys.exit(isolation.enter(arguments))
        if options.source:
            with open(options.source) as file:
                document = json.load(file)
        else:
            document = measure(options)
    except RuntimeError as e:
        sys.exit(f"bench: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    print("\n".join(f"{key}: {value}" for key, value in document["machine"].items()))
    print(table.text(document["samples"]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=1)
    if options.pages:
        write_pages(document)


if __name__ == "__main__":
    main()
