"""``python -m tests.fuzz NAME [options of libFuzzer]``: look for bytes that break a rule of tests/fuzz/NAME.py.

What it learns goes into the first directory named; without one, corpus/NAME is read and nothing is kept.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile

import atheris

CORPUS = os.path.join(os.path.dirname(__file__), "corpus")


def main() -> None:
    if len(sys.argv) < 2 or not os.path.isdir(os.path.join(CORPUS, sys.argv[1])):
        raise SystemExit(f"usage: python -m tests.fuzz NAME [options], with a NAME of {sorted(os.listdir(CORPUS))}")
    name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["criserver", "snapshotter", "h11", "wsproto", "jsonschema"]):
        module = importlib.import_module(f"tests.fuzz.{name}")
    with tempfile.TemporaryDirectory() as kept:
        directories = [] if any(not option.startswith("-") for option in options) else [kept]
        atheris.Setup([sys.argv[0], *options, *directories, os.path.join(CORPUS, name)], module.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
