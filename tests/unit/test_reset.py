"""What ``criserver reset`` deletes at its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver import reset


def test_what_cannot_be_deleted_is_told_of_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, socket = tmp_path / "state", tmp_path / "sock"
    for name in ("a", "b", "c"):
        (state / name).mkdir(parents=True)
        (state / name / "f").touch()
    (state / "b/stays").touch()
    socket.touch()
    real = os.unlink

    def refused(path: str, *, dir_fd: int | None = None) -> None:
        if path == "stays":
            raise OSError(5, "Input/output error")
        real(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        (left,) = reset._delete(str(state), str(socket))
    assert left.startswith(f"{state}/b, which cannot be deleted: ")
    assert left.endswith(f"Input/output error: '{state}/b/stays'")
    assert os.listdir(state) == ["b"]
    assert not socket.exists()
    assert reset._delete(str(state), str(socket)) == []
    assert not state.exists()
