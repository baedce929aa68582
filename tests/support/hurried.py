"""A daemon with shorter deadlines, for tests of what never ends.

``python -m tests.support.hurried MODULE.NAME=SECONDS... serve --config FILE`` runs ``criserver serve`` after it has set
these constants.
"""

from __future__ import annotations

import importlib
import sys

from criserver.cli import main

if __name__ == "__main__":
    while "=" in sys.argv[1]:
        name, _, seconds = sys.argv.pop(1).partition("=")
        module, _, constant = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), constant), float), name
        setattr(importlib.import_module(module), constant, float(seconds))
    sys.exit(main())
