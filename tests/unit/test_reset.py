"""What ``criserver reset`` deletes at its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver import reset
from criserver.config import load
from criserver.own_directories import STATE


def test_what_cannot_be_deleted_is_told_of_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, socket = tmp_path / "state", tmp_path / "sock"
    for name in STATE.names:
        (state / name).mkdir(parents=True)
        (state / name / "f").touch()
    (state / "ns/stays").touch()
    (state / STATE.marker).touch()
    socket.touch()
    real = os.unlink

    def refused(path: str, *, dir_fd: int | None = None) -> None:
        if path == "stays":
            raise OSError(5, "Input/output error")
        real(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        kept, (left,) = reset._delete(str(state), STATE, [str(socket)])
    assert kept == []
    assert left.startswith(f"{state}/ns, which cannot be deleted: ")
    assert left.endswith(f"Input/output error: '{state}/ns/stays'")
    assert sorted(os.listdir(state)) == [STATE.marker, "ns"]
    assert not socket.exists()
    assert reset._delete(str(state), STATE, [str(socket)]) == ([], [])
    assert not state.exists()


def test_sockets_that_a_killed_daemon_has_left_are_its_own(tmp_path: Path) -> None:
    """Those elsewhere may be another program's, such as containerd's."""
    file = tmp_path / "config.toml"
    text = (
        f'state = "{tmp_path}"\n[grpc]\naddress = "/elsewhere/own.sock"\ncontainerd_address = "/elsewhere/other.sock"\n'
        f'[metrics]\naddress = "unix://{tmp_path}/metrics.sock"\n'
    )
    file.write_text(text)
    assert reset._sockets(load(str(file))) == ["/elsewhere/own.sock", f"{tmp_path}/metrics.sock"]
    (tmp_path / "link").symlink_to(".")
    file.write_text(text.replace(f'state = "{tmp_path}"', f'state = "{tmp_path}/link"'))
    assert reset._sockets(load(str(file))) == ["/elsewhere/own.sock", f"{tmp_path}/metrics.sock"]
