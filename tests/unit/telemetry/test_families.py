"""The table of families: names and units are Prometheus' conventions, and the page is made from it."""

from __future__ import annotations

import re

import pytest

from criserver.telemetry.families import TABLE
from criserver.telemetry.instruments import Counter, Histogram, Instrument
from criserver.telemetry.metrics_page import rows
from tests.support.pages import ROOT


def test_a_name_stands_once() -> None:
    assert len({family.name for family in TABLE}) == len(TABLE) > 20


@pytest.mark.parametrize("family", TABLE, ids=lambda family: str(family.name))
def test_names_units_and_labels_follow_the_conventions(family: Instrument) -> None:
    """Prometheus, "Metric and label naming": a prefix, base units in the plural, _total for counters alone."""
    assert re.fullmatch(r"criserver(_[a-z]+)+", family.name)
    assert family.name.endswith("_total") == isinstance(family, Counter)
    assert not re.search(r"milliseconds|_ms\b|kilobytes|megabytes", family.name)
    assert family.text.endswith(".")
    # Their number has no limit, and the kubelet serves them.
    assert not {"pod", "namespace", "container", "image"} & set(family.labels)
    assert set(family.bounded) <= set(family.labels)
    if isinstance(family, Histogram):
        assert family.name.endswith("_seconds")
        assert list(family.buckets) == sorted(set(family.buckets))


def test_the_page_has_the_table() -> None:
    """``python -m criserver.telemetry.metrics_page`` prints what has to be there."""
    page = (ROOT / "docs/metrics.md").read_text()
    assert "\n".join(rows()) in page
