"""Patterns of names of images."""

from __future__ import annotations

import re
from collections.abc import Iterable


class NamePatterns:
    """Patterns in which "*" stands for any text. A pattern matches a whole name.

    These are more than CRI-O's ``pinned_images``, which may have "*" at the end or at both ends only.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = [re.compile(".*".join(map(re.escape, pattern.split("*")))) for pattern in patterns]

    def match(self, names: Iterable[str]) -> str:
        """The first of the names that one of the patterns matches; "" if none does."""
        return next((name for name in names if any(p.fullmatch(name) for p in self._patterns)), "")
