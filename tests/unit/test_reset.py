"""What ``criserver reset`` deletes at its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver import reset
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
        kept, (left,) = reset._delete(str(state), STATE, str(socket))
    assert kept == []
    assert left.startswith(f"{state}/ns, which cannot be deleted: ")
    assert left.endswith(f"Input/output error: '{state}/ns/stays'")
    assert sorted(os.listdir(state)) == [STATE.marker, "ns"]
    assert not socket.exists()
    assert reset._delete(str(state), STATE, str(socket)) == ([], [])
    assert not state.exists()
