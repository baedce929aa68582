"""``python -m tests.faults``: the whole matrix, and its tables. ``make faults`` runs it.

Words are operations whose names contain them. ``--points`` lists the points. ``--kinds kill``, ``--kinds error``,
``--kinds lasting`` and ``--kinds helper`` run a part: kills of the daemon, errors of the kernel once, errors that last
until the call has ended, and faults of helper processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults import helper_matrix
from tests.faults.helper_matrix import HelperMatrix, helper_node
from tests.faults.matrix import START_UP, Matrix, Result, errors_of, table
from tests.faults.more_operations import more_operations, pushed
from tests.faults.operations import Operation, archives, operations
from tests.support.criu import REAL_CRIU
from tests.support.fixtures import RUNC
from tests.support.node import RUNTIME, Node, handler
from tests.support.registry import running


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("operation", nargs="*")
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--kinds", choices=("kill", "error", "lasting", "helper"))
    parser.add_argument("--match", default="", help="only points that contain this")
    options = parser.parse_args()
    results: list[Result] = []
    harmed: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch, running(scratch) as registry:
        base, own = archives(scratch)
        possible = [*operations(own), *more_operations(own, pushed(registry))]
        words = options.operation
        chosen = [found for found in possible if not words or any(word in found.name for word in words)]
        if options.kinds != "helper":
            results = _of_the_daemon(options, base, chosen)
        if options.kinds in (None, "helper"):
            harmed = _of_helpers(options, base, chosen)
    if results:
        print(table(results))
    if harmed:
        print(helper_matrix.table(harmed))
    return int(any(result.failures for result in (*results, *harmed)))


def _of_the_daemon(options: argparse.Namespace, base: str, chosen: list[Operation]) -> list[Result]:
    """Kills of the daemon, and errors of the kernel."""
    results = []
    node = Node(handler("runc", RUNTIME) + (handler("newer", RUNC) if RUNC else ""))
    try:
        matrix = Matrix(node)
        _begin(node, matrix, base)
        for operation in chosen:
            points = [point for point in matrix.points(operation) if options.match in point]
            with _tried(operation.name, points, options) as (result, tried):
                for point in tried:
                    if options.kinds in (None, "kill"):
                        matrix.kill(operation, point, result)
                    for number, lasting in _errors(point, options):
                        matrix.error(operation, point, number, result, lasting=lasting)
            results.append(result)
        if not options.operation or START_UP in options.operation:
            points = [point for point in matrix.points_of_start() if options.match in point]
            with _tried(START_UP, points, options) as (result, tried):
                for point in tried:
                    if options.kinds in (None, "kill"):
                        matrix.fail_start(point, 0, result)
                    for number, lasting in _errors(point, options):
                        matrix.fail_start(point, number, result, lasting=lasting)
            results.append(result)
    finally:
        node.close()
    return results


def _errors(point: str, options: argparse.Namespace) -> list[tuple[int, bool]]:
    """The errors that are tried at a point, each with whether it lasts."""
    kinds = [lasting for kind, lasting in (("error", False), ("lasting", True)) if options.kinds in (None, kind)]
    return [(number, lasting) for number in errors_of(point) for lasting in kinds]


def _of_helpers(options: argparse.Namespace, base: str, chosen: list[Operation]) -> list[Result]:
    """Faults of helper processes."""
    results = []
    node = helper_node()
    matrix = HelperMatrix(node)
    try:
        _begin(node, matrix, base)
        for operation in chosen:
            faults = [(point, fault) for point, fault in matrix.faults(operation) if options.match in point]
            words = [f"{point} {fault}" for point, fault in faults]
            with _tried(operation.name, words, options) as (result, tried):
                for point, fault in faults[: len(tried)]:
                    matrix.harm(operation, point, fault, result)
            results.append(result)
        if not options.operation or START_UP in options.operation:
            faults = [(point, fault) for point, fault in matrix.faults_of_start() if options.match in point]
            with _tried(START_UP, [f"{point} {fault}" for point, fault in faults], options) as (result, tried):
                for point, fault in faults[: len(tried)]:
                    matrix.harm_start(point, fault, result)
            results.append(result)
    finally:
        matrix.close()
        node.close()
    return results


def _begin(node: Node, matrix: Matrix, base: str) -> None:
    node.start()
    matrix.begin(base)
    node.run_pod("pod")  # the directories that a daemon makes once
    matrix.cleaned()


@contextmanager
def _tried(name: str, points: list[str], options: argparse.Namespace) -> Iterator[tuple[Result, list[str]]]:
    """The result of an operation, and the points that are tried: none where they are only listed."""
    began = time.monotonic()
    result = Result(name, points=len(points))
    result.tell = lambda failure: print(failure, flush=True)
    if options.points:
        print(name, *points, sep="\n  ")
    yield result, [] if options.points else points
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ["PATH"] = f"{os.path.dirname(REAL_CRIU or '')}:{os.environ['PATH']}"  # runc looks criu up
    sys.exit(main())
