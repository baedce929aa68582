"""The limits of a container in its spec."""

from __future__ import annotations

from typing import Any

import pytest

from criserver.oci.spec_inputs import HostFacts
from criserver.oci.spec_resources import complete_limits

VERSION_2 = HostFacts(capabilities=(), unified_cgroups=True, swap_accounting=True)


@pytest.mark.parametrize(
    ("asked", "in_force", "expected"),
    [
        ({"cpu": {"quota": 5}}, {}, {"cpu": {"quota": 5, "period": 100_000}}),
        ({"cpu": {"quota": 5}}, {"cpu": {"period": 7}}, {"cpu": {"quota": 5, "period": 7}}),
        ({"cpu": {"quota": 5, "period": 9}}, {}, {"cpu": {"quota": 5, "period": 9}}),
        ({"cpu": {"cpus": "0"}}, {"cpu": {"period": 7}}, {"cpu": {"cpus": "0"}}),
        ({"memory": {"limit": 5}}, {}, {"memory": {"limit": 5}, "unified": {"memory.swap.max": "0"}}),
        ({"memory": {"limit": 5}}, {"unified": {"memory.swap.max": "9"}}, {"memory": {"limit": 5}}),
        ({"memory": {"swap": 8}}, {"memory": {"limit": 5}}, {"unified": {"memory.swap.max": "3"}}),
        ({}, {"cpu": {"quota": 5}}, {}),
    ],
)
def test_an_update_has_what_its_limits_need(
    asked: dict[str, Any], in_force: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert complete_limits(asked, in_force, VERSION_2) == expected
