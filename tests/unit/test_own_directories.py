"""The directories root and state: which ones a daemon takes for its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError
from criserver.own_directories import ROOT, STATE, hold


def held(directory: Path, kind: object = STATE, socket: str = "/nowhere/sock") -> list[str]:
    os.close(hold(str(directory), kind, socket))  # type: ignore[arg-type]
    return sorted(os.listdir(directory))


def test_a_directory_that_is_missing_or_empty_becomes_ours(tmp_path: Path) -> None:
    assert held(tmp_path / "a/b") == ["criserver.lock", "criserver.state"]
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    assert held(tmp_path / "disk", ROOT) == ["criserver.lock", "criserver.root", "lost+found"]
    assert "criserver reset" in (tmp_path / "disk/criserver.root").read_text()
    # The socket of a daemon with another state directory.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/my.sock").touch()
    assert "criserver.state" in held(tmp_path / "run", STATE, f"{tmp_path}/run/my.sock")


def test_a_directory_that_is_ours_may_have_other_files(tmp_path: Path) -> None:
    held(tmp_path)
    (tmp_path / "theirs").touch()
    assert "theirs" in held(tmp_path)


def test_a_directory_of_a_release_without_markers_gets_one(tmp_path: Path) -> None:
    for name in ("criserver.lock", "criserver.db", "snapshots", "notes"):
        (tmp_path / name).touch()
    assert "criserver.root" in held(tmp_path, ROOT)


def test_a_directory_of_others_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "containers"):
        (tmp_path / name).mkdir()
    os.chmod(tmp_path, 0o755)
    with pytest.raises(FailedPreconditionError, match=r"files that criserver did not make \(a, b, c and more\)"):
        held(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "containers"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    # A directory of the other kind is not ours either.
    held(tmp_path / "a", ROOT)
    os.unlink(tmp_path / "a/criserver.lock")
    with pytest.raises(FailedPreconditionError, match=r"\(criserver\.root\)"):
        held(tmp_path / "a", STATE)


def test_what_cannot_be_used_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match="it is not a directory"):
        held(tmp_path / "file")
    with pytest.raises(FailedPreconditionError, match=re.escape(f"state = {tmp_path}/file/x cannot be used: ")):
        held(tmp_path / "file/x")
    with pytest.raises(FailedPreconditionError, match=r"state = /proc/criserver cannot be used"):
        held(Path("/proc/criserver"))


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    fd = hold(str(tmp_path), STATE, "")
    try:
        with pytest.raises(FailedPreconditionError, match=f"another criserver \\(PID {os.getpid()}\\) uses {tmp_path}"):
            held(tmp_path)
    finally:
        os.close(fd)
    held(tmp_path)
