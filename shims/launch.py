"""How the daemon starts the nursery: the command line, and nothing that the nursery itself needs."""

from __future__ import annotations

import os


def command(python: str, fd: int) -> list[str]:
    """The argv that runs the nursery on the inherited socket `fd` with the interpreter `python`.

    The interpreter is isolated: no environment variables, no site-packages, no byte code written, and the
    directory it is started in is not searched. This package is found by its own location.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path.insert(0, {root!r}); from shims.nursery_process import main; main(int(sys.argv[1]))"
    return [python, "-E", "-s", "-S", "-B", "-P", "-c", code, str(fd)]
