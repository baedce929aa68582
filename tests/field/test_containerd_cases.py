"""What docs/field.md says of containerd is so. It runs where a containerd of that release line is on PATH."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from criserver.runtime import cgroups
from tests.field.corpus import CASES, CONTAINERD
from tests.support.containerd import ContainerdNode, installed, version
from tests.support.field import Field, FieldCase, field_of

pytestmark = [
    pytest.mark.skipif(not installed() or version() != CONTAINERD, reason=f"no containerd {CONTAINERD} is on PATH"),
    pytest.mark.skipif(
        "memory" not in cgroups.roots(), reason="the page has containerd's outcomes on cgroup version 1"
    ),
]


@pytest.fixture(scope="module")
def found(nothing_left: None) -> Iterator[Field]:
    with field_of(ContainerdNode()) as field:
        yield field


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_with_containerd(found: Field, case: FieldCase) -> None:
    assert case.outcome(found) == case.containerd, found.said
