"""The table of operations: names and labels, and the page that lists them."""

from __future__ import annotations

import re

from criserver.telemetry.operations import TABLE
from tests.support.pages import ROOT, rows

# Its thread makes it, so it is no part of a call.
METRICS_ALONE = {"transaction"}


def test_a_name_stands_once_and_labels_are_plain() -> None:
    names = [operation.name for operation in TABLE]
    assert len(set(names)) == len(names) > 15
    for operation in TABLE:
        assert set(operation.of_one) <= set(operation.labels)
        assert all(re.fullmatch("[a-z]+", label) for label in operation.labels)


def test_the_page_has_each_part_with_its_labels() -> None:
    page = (ROOT / "docs/tracing.md").read_text()
    described = {name for cell in rows(page) for name in re.split(", ", cell.replace("`", "")) if name != "part"}
    parts = {" ".join((o.name, *(label.upper() for label in o.labels))) for o in TABLE if o.name not in METRICS_ALONE}
    assert described == parts
