"""``python -m tests.faults``: the whole matrix, and its table. ``make faults`` runs it.

Words are operations whose names contain them. ``--points`` lists the points, ``--kinds kill`` or ``--kinds error`` runs
one half.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time

from tests.faults.matrix import START_UP, Matrix, Result, errors_of, table
from tests.faults.operations import archives, operations
from tests.support.fixtures import import_image
from tests.support.node import Node


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("operation", nargs="*")
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--kinds", choices=("kill", "error"))
    parser.add_argument("--match", default="", help="only points that contain this")
    options = parser.parse_args()
    scratch = tempfile.mkdtemp()
    node = Node()
    results: list[Result] = []
    try:
        base, own = archives(scratch)
        matrix = Matrix(node)
        node.start()
        import_image(node, base)
        matrix.begin()
        operations(own)[0].call(node, "")  # the directories that a daemon makes once
        matrix.cleaned()
        for operation in operations(own):
            if options.operation and not any(word in operation.name for word in options.operation):
                continue
            began = time.monotonic()
            points = [point for point in matrix.points(operation) if options.match in point]
            result = Result(operation.name, points=len(points))
            results.append(result)
            if options.points:
                print(operation.name, *points, sep="\n  ")
                continue
            for point in points:
                before = len(result.failures)
                if options.kinds != "error":
                    matrix.kill(operation, point, result)
                for number in errors_of(point) if options.kinds != "kill" else ():
                    matrix.error(operation, point, number, result)
                for failure in result.failures[before:]:
                    print(failure, flush=True)
            print(f"{operation.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if not options.operation or START_UP in options.operation:
            began = time.monotonic()
            points = [point for point in matrix.points_of_start() if options.match in point]
            result = Result(START_UP, points=len(points))
            results.append(result)
            if options.points:
                print(START_UP, *points, sep="\n  ")
                points = []
            for point in points:
                before = len(result.failures)
                for number in (0, *errors_of(point)):
                    if options.kinds != ("kill" if number else "error"):
                        matrix.fail_start(point, number, result)
                for failure in result.failures[before:]:
                    print(failure, flush=True)
            print(f"{START_UP}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        node.close()
        shutil.rmtree(scratch)
    print(table(results))
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main())
