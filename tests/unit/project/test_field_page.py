"""docs/field.md has every case of the corpus, and each that differs has its row in the docs."""

from __future__ import annotations

import re

from tests.field.corpus import CASES, page
from tests.support.pages import ROOT


def test_the_page_is_what_the_corpus_gives() -> None:
    assert (ROOT / "docs/field.md").read_text() == page(), "python -m tests.field writes it"


def test_every_line_of_the_field_has_a_case() -> None:
    assert {case.item for case in CASES} == set(range(16))
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.here and case.containerd for case in CASES)


def test_what_differs_on_purpose_has_its_row_in_the_docs() -> None:
    named = {case.differs for case in CASES if case.differs}
    text = (ROOT / "docs/from-containerd.md").read_text()
    assert [row for row in sorted(named) if f"| {row} |" not in text] == []


def test_reports_are_named_as_upstream_names_them() -> None:
    for case in CASES:
        assert re.fullmatch(r"(|[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*)", case.report), case.name
