"""Each case of the corpus has the outcome of docs/field.md. All share one node and most of them one pod."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.field.corpus import CASES
from tests.support.field import Field, FieldCase, field_of
from tests.support.node import Node


@pytest.fixture(scope="module")
def found(nothing_left: None) -> Iterator[Field]:
    with field_of(Node()) as field:
        yield field
        field.node.remove_pods()
        assert field.node.settled() == []
        assert field.node.complaints() == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case(found: Field, case: FieldCase) -> None:
    assert case.outcome(found) == case.here, found.said
