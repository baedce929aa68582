"""``python -m tests.field``: run the corpus here and with containerd, print what differs, and write docs/field.md."""

from __future__ import annotations

import sys

from tests.field.corpus import CASES, CONTAINERD, page
from tests.support.containerd import ContainerdNode, installed, version
from tests.support.field import field_of
from tests.support.node import Node
from tests.support.pages import ROOT


def main() -> int:
    wrong = 0
    kinds: list[type[Node]] = [Node, ContainerdNode] if installed() else [Node]
    if installed() and version() != CONTAINERD:
        print(f"containerd is {version()}, the page has the outcomes of {CONTAINERD}")
    for kind in kinds:
        with field_of(kind()) as field:
            for case in CASES:
                expected = case.here if kind is Node else case.containerd
                found = case.outcome(field)
                if found != expected:
                    wrong += 1
                    print(f"{kind.__name__}: {case.name}: {found!r}, not {expected!r} {field.said}", flush=True)
    (ROOT / "docs/field.md").write_text(page())
    print(f"{len(CASES)} cases with {len(kinds)} runtimes, {wrong} other outcomes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
