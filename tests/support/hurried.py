"""A daemon with shorter deadlines, for tests of what never ends.

``python -m tests.support.hurried MODULE.NAME=SECONDS... serve --config FILE`` runs ``criserver serve`` after it has set
these constants. MODULE.CLASS.FIELD is the default of a NamedTuple's field.
"""

from __future__ import annotations

import pkgutil
import sys
from types import ModuleType

from criserver.cli import main


def hurry(words: list[str]) -> list[str]:
    """Set the constants that the first words name, each as MODULE.NAME=SECONDS. Returns the other words."""
    for number, word in enumerate(words):
        name, equals, seconds = word.partition("=")
        if not equals:
            return words[number:]
        path, _, constant = name.rpartition(".")
        owner = pkgutil.resolve_name(path)
        if isinstance(owner, ModuleType):
            assert isinstance(getattr(owner, constant), float), name
            setattr(owner, constant, float(seconds))
        else:
            defaults = {**owner._field_defaults, constant: float(seconds)}
            assert defaults.keys() == owner._field_defaults.keys(), name
            owner.__new__.__defaults__ = tuple(defaults.values())
    return []


if __name__ == "__main__":
    sys.exit(main(hurry(sys.argv[1:])))
