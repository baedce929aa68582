"""The device nodes of the node, and its AppArmor profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.runtime import host
from tests.support.descriptors import room_for


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


def test_without_descriptors_the_kernel_is_not_taken_for_one_without_apparmor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container would run without the profile that it asks for."""
    for name in ("_APPARMOR_SWITCH", "_APPARMOR_PROFILES"):
        monkeypatch.setattr(host, name, str(tmp_path / name))
        (tmp_path / name).write_text("Y\n")
    with room_for(0), pytest.raises(OSError, match="Too many open files"):
        host.apparmor_profiles()


def test_the_names_of_profiles_may_be_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_APPARMOR_SWITCH", "_APPARMOR_PROFILES"):
        monkeypatch.setattr(host, name, str(tmp_path / name))
    assert host.apparmor_profiles() is None
    (tmp_path / "_APPARMOR_SWITCH").write_text("Y\n")
    (tmp_path / "_APPARMOR_PROFILES").write_bytes(b"/opt/\xe9 (enforce)\nown (x) (complain)\n")
    assert host.apparmor_profiles() == frozenset({"/opt/\udce9", "own (x)"})


def test_a_directory_of_devices_that_goes_while_its_parent_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel removes /dev/bus/usb/002 with the last device in it."""
    monkeypatch.setattr(host, "_is_node", lambda _: True)  # only root can make device nodes
    (tmp_path / "kept").touch()
    (tmp_path / "gone").mkdir()
    found = host._nodes_below(str(tmp_path), 10)
    assert next(found)[0] == str(tmp_path / "kept")
    (tmp_path / "gone").rmdir()
    assert list(found) == []
    tmp_path.joinpath("kept").unlink()
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        list(host._nodes_below(str(tmp_path), 10))
