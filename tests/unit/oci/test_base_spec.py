"""What a container's spec has of its handler's base_runtime_spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError
from criserver.oci import base_spec


@pytest.mark.parametrize(
    ("base", "spec", "merged"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": 1, "b": 2}, {"a": 3}, {"a": 3, "b": 2}),
        (
            {"linux": {"x": [1], "y": {"m": 1, "n": 2}}},
            {"linux": {"x": [], "y": {"n": 3}}},
            {"x": [], "y": {"m": 1, "n": 3}},
        ),
        ({"linux": {"y": 1}}, {"linux": {"y": {"m": 1}}}, {"y": {"m": 1}}),
    ],
)
def test_the_spec_wins_key_by_key(base: dict[str, Any], spec: dict[str, Any], merged: dict[str, Any]) -> None:
    before = json.dumps(base)
    found = base_spec.under(base, spec)
    assert found.get("linux", found) == merged
    assert json.dumps(base) == before


def test_a_file_has_no_say_in_security(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    linux = {"seccomp": {}, "mountLabel": "l", "rootfsPropagation": "shared", "sysctl": {"a": "1"}}
    path.write_text(json.dumps({"process": {"apparmorProfile": "p", "selinuxLabel": "s", "cwd": "/"}, "linux": linux}))
    assert base_spec.load(str(path)) == {"process": {"cwd": "/"}, "linux": {"sysctl": {"a": "1"}}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "top level"),
        ('{"process": {"rlimits": [{"type": "nofile", "soft": 1, "hard": 1}]}}', "process.rlimits.0.type"),
        ('{"process": {"env": ["x"]}}', "process.env.0"),
        ('{"mounts": [{"destination": "/"}]}', "mounts.0.destination"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "base.json"
    with pytest.raises(FailedPreconditionError, match="cannot be read: No such file"):
        base_spec.load(str(path))
    path.write_text(text)
    with pytest.raises(FailedPreconditionError, match=words) as e:
        base_spec.load(str(path))
    assert str(path) in str(e.value)
