"""The plugins of a directory, their order, and the configuration of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.nri.plugin_files import PluginFile, check_name, find


@pytest.mark.parametrize(("index", "name"), [("00", "a"), ("99", "A-b_c.d+9")])
def test_names_that_are_right(index: str, name: str) -> None:
    check_name(index, name)


@pytest.mark.parametrize(
    ("index", "name"),
    [("", "a"), ("1", "a"), ("123", "a"), ("ab", "a"), ("١١", "a"), ("10", ""), ("10", "a b"), ("10", "é")],
)
def test_names_that_are_wrong(index: str, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="NRI plugin"):
        check_name(index, name)


def test_a_directory(tmp_path: Path) -> None:
    plugins, configs = tmp_path / "plugins", tmp_path / "conf.d"
    plugins.mkdir()
    configs.mkdir()
    for name, mode in (("20-b", 0o755), ("10-a", 0o755), ("30-off", 0o644), ("x-y", 0o755), ("40", 0o755)):
        (plugins / name).write_text("")
        (plugins / name).chmod(mode)
    (plugins / "50-directory").mkdir()
    (configs / "a.conf").write_text("of the name")
    (configs / "b.conf").write_text("of the name")
    (configs / "20-b.conf").write_text("of the index and name")
    assert find(str(plugins), str(configs)) == [
        PluginFile(str(plugins / "10-a"), "10", "a", "of the name"),
        PluginFile(str(plugins / "20-b"), "20", "b", "of the index and name"),
    ]


def test_a_configuration_that_cannot_be_read_leaves_its_plugin_out(tmp_path: Path) -> None:
    for name in ("10-a", "20-b"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "a.conf").write_bytes(b"\xff")
    assert [file.name for file in find(str(tmp_path), str(tmp_path))] == ["b"]


def test_no_directory_is_no_plugin(tmp_path: Path) -> None:
    assert find(str(tmp_path / "none"), str(tmp_path)) == []
    (tmp_path / "file").write_text("")
    assert find(str(tmp_path / "file"), str(tmp_path)) == []
