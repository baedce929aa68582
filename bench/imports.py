"""A program of modules.py: prints what each import of the daemon has added to this process, in KiB, as JSON.

A module's figure is without the modules that it imports itself. With ``-X tracemalloc`` it is the memory of Python's
objects, and otherwise the anonymous memory of the process. So that little is there before, this imports little.
"""

import sys
from importlib import _bootstrap, import_module

TRACING = "tracemalloc" in sys._xoptions
if TRACING:
    import gc
    import tracemalloc


def used() -> float:
    """KiB now."""
    if TRACING:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / 1024
    with open("/proc/self/smaps_rollup") as file:
        return next(float(line.split()[1]) for line in file if line.startswith("Anonymous:"))


STARTED = used()
LOAD = _bootstrap._load_unlocked  # type: ignore[attr-defined]
own: dict[str, float] = {}
below = [0.0]  # what the imports in the module under way have added; the last is of the innermost


def load(spec):  # type: ignore[no-untyped-def]
    """The import system's function that loads one module."""
    before = used()
    below.append(0.0)
    try:
        return LOAD(spec)
    finally:
        added = used() - before
        own[spec.name] = own.get(spec.name, 0.0) + added - below.pop()
        below[-1] += added


if __name__ == "__main__":
    _bootstrap._load_unlocked = load  # type: ignore[attr-defined]
    for name in ("criserver.cli", "criserver.daemon"):
        import_module(name)
    import json

    print(json.dumps({"started": STARTED, "own": own}))
