"""What `criserver check` finds in the files of registries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from criserver.check import registries
from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Level
from criserver.config import load


def found(root: Path, *, auth_file: str = "") -> list[str]:
    """The words of the warnings."""
    config = dataclasses.replace(load(None), registry_config_path="/certs.d", registry_auth_file=auth_file)
    findings = list(registries.check(ExaminedNode(root=str(root)), config))
    assert all(finding.level is not Level.MISSING for finding in findings)
    return [finding.words for finding in findings if finding.level is Level.WARNING]


def write_hosts(root: Path, content: str) -> Path:
    path = root / "certs.d/registry.example/hosts.toml"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


def test_nothing_is_wrong_without_files_and_with_sound_ones(tmp_path: Path) -> None:
    assert found(tmp_path) == []
    write_hosts(tmp_path, 'server = "https://a.example"\n[host."https://m.example"]\nskip_verify = true\n')
    (tmp_path / "auth.json").write_text('{"auths": {}}')
    assert found(tmp_path, auth_file="/auth.json") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('sever = "https://a.example"', "unknown key sever"),
        ('[host."https://m.example"]\nskip_verfy = true', 'unknown key host."https://m.example".skip_verfy'),
        ("server = 5", "key server: is not a string"),
        ("server = ", "is not TOML"),
    ],
)
def test_a_fault_of_hosts_toml_is_found(tmp_path: Path, content: str, words: str) -> None:
    path = write_hosts(tmp_path, content)
    (warning,) = found(tmp_path)
    assert str(path) in warning
    assert words in warning


def test_a_missing_or_broken_file_of_credentials_is_found(tmp_path: Path) -> None:
    (warning,) = found(tmp_path, auth_file="/none.json")
    assert "registry.auth_file = /none.json: there is no such file" in warning
    (tmp_path / "broken.json").write_text("{")
    (warning,) = found(tmp_path, auth_file="/broken.json")
    assert "is no JSON object" in warning
