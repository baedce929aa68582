"""The command line by which the daemon starts the nursery. The nursery itself does not need this module."""

from __future__ import annotations

import os


def command(python: str, fd: int) -> list[str]:
    """The argv that runs the nursery on the inherited socket `fd` with the interpreter `python`.

    The interpreter is isolated: it reads no environment variables and no site-packages, writes no byte code, and does
    not search its working directory. It finds this package by the package's location.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path.insert(0, {root!r}); from shims.nursery_process import main; main(int(sys.argv[1]))"
    return [python, "-E", "-s", "-S", "-B", "-P", "-c", code, str(fd)]
