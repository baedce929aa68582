"""The directories that cannot be root or state."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.config import load
from criserver.config.system_directories import fault
from criserver.errors import InvalidArgumentError


def words(root: str, state: str) -> str:
    found = fault(root, state)
    return found[1] if found else ""


@pytest.mark.parametrize(
    "path",
    ["/", "/run", "/var", "/var/lib", "/etc", "/usr", "/home", "/tmp", "/var/run", "/proc/x", "//run", "/run/../etc/."],
)
@pytest.mark.parametrize("key", ["root", "state"])
def test_a_directory_of_the_system_is_refused(tmp_path: Path, key: str, path: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'{key} = "{path}"\n')
    with pytest.raises(InvalidArgumentError, match=f"{file}: {key} = .*other programs use this directory"):
        load(str(file))


def test_a_link_to_a_directory_of_the_system_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/var/lib")
    assert "(/var/lib)" in words(f"{tmp_path}/link", "/run/criserver")


def test_neither_directory_may_be_in_the_other(tmp_path: Path) -> None:
    assert "same directory" in words("/data/x", "/data/x")
    assert words("/data/x", "/data/x/state") == "state = '/data/x/state' is in root = '/data/x'; put it outside"
    assert words("/data/x/root", "/data/x") == "root = '/data/x/root' is in state = '/data/x'; put it outside"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert "same directory" in words(f"{tmp_path}/real", f"{tmp_path}/link")
    assert "is in root" in words(f"{tmp_path}/real", f"{tmp_path}/link/state")


def test_directories_beside_each_other_are_fine() -> None:
    assert fault("/data/criserver", "/data/criserver-state") is None
    assert fault("/var/lib/criserver", "/run/criserver") is None
    assert fault("/data", "/run/criserver") is None
