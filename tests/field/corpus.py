"""All cases, and the page that shows them."""

from __future__ import annotations

import re

from tests.field import archives, configurations, kubelets, pods, registries, tokens
from tests.support.field import FieldCase

CASES: tuple[FieldCase, ...] = tuple(
    sorted(
        (
            *configurations.CASES,
            *registries.CASES,
            *tokens.CASES,
            *archives.CASES,
            *pods.CASES,
            *kubelets.CASES,
        ),
        key=lambda case: case.item,
    )
)
# The release line whose outcomes the cases have.
CONTAINERD = "2.1"

_ITEMS = (
    "Options that a node cannot honour",
    "Configurations of images",
    "Names of platforms",
    "Media types and layers that other tools treat alike",
    "401 behind a redirect",
    "Mirrors that answer with something that is no manifest",
    "HTTP",
    "Archives of images",
    "Layers",
    "Users",
    "Ports below 1024 and ping",
    "Sysctls and CNI",
    "Devices that are directories",
    "Updates and statuses",
    "Differences that stay",
    "What kubelets and their users ask of pods",
)
_HEAD = f"""\
# What runs on other runtimes

For users who move from another runtime, and for contributors. Each line is a case that was reported to a builder, a
registry or a runtime, or one of the same kind. `tests/field` runs them all. A new report costs one case in a file of
that directory.

`python -m tests.field` runs the cases here and, if containerd is on `PATH`, there too. It prints each outcome that
differs from this page, and writes the page. The outcomes of containerd are those of {CONTAINERD} with runc, a root on
tmpfs and cgroup version 1.

There are three verdicts:

1. **as containerd**: the outcome is the same.
2. **holds**: the outcome is the intended one, and that of containerd is another.
3. **differs on purpose**: [Differences that stay](from-containerd.md#differences-that-stay) has the row that is named
   here, with the reason.
"""


def page() -> str:
    """docs/field.md."""
    parts = [_HEAD]
    for number, title in enumerate(_ITEMS):
        lines = [_row(case) for case in CASES if case.item == number]
        table = ["| case | report | here | containerd | verdict |", "|---|---|---|---|---|", *lines]
        parts.append(f"## {title}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def _row(case: FieldCase) -> str:
    return f"| {case.name} | {_links(case.report)} | {case.here} | {case.containerd} | {case.verdict} |"


def _links(reports: str) -> str:
    linked = re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\g<0>](https://github.com/\1/issues/\2)", reports)
    return linked or "no report known"
