"""The device nodes of the node."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.runtime import host


def test_a_directory_as_a_device_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep/deeper").mkdir(parents=True)
    (tmp_path / "deep/file").touch()
    monkeypatch.setattr(host, "_MAX_DEVICE_ENTRIES", 3)
    assert host.device_nodes(str(tmp_path), "/dev/x") == {}
    (tmp_path / "deep/deeper/file").touch()
    with pytest.raises(InvalidArgumentError, match="is a directory with more than 3 entries"):
        host.device_nodes(str(tmp_path), "/dev/x")


@pytest.mark.parametrize(("asked", "inside"), [("/dev/x", "/dev/x/null"), ("/", "/null")])
def test_a_node_below_a_directory_keeps_its_path(asked: str, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/dev/null").stat()
    monkeypatch.setattr(host, "_nodes_below", lambda top, most: [(f"{top}/null", status)])
    ((path, node),) = host.device_nodes("/usr", asked).items()
    assert (path, node.path, node.kind, node.major, node.minor) == ("/usr/null", inside, "c", 1, 3)
