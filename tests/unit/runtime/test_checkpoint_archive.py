"""The archive of a checkpoint: its documents, and the tar of any tree that a container may have made."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError
from criserver.model import IdMapping, UserNamespace
from criserver.runtime import checkpoint_archive
from snapshotter import removal


def nothing() -> None:
    """Nothing ends it early."""


class Ends:
    """Ends the work at its ``left + 1``th look."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


def entries(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {entry.name: entry for entry in tar}


def test_a_diff_keeps_names_links_and_modes(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    long = "l" * 200
    (upper / "directory" / long).mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(upper) + b"/not utf-8 \xff")).write_text("x")
    (upper / "directory" / "outside").symlink_to("/etc/shadow")
    (upper / "one").write_text("shared")
    (upper / "two").hardlink_to(upper / "one")
    (upper / "one").chmod(0o4755)
    assert checkpoint_archive.write_diff(str(upper), str(tmp_path / "diff.tar"), None, nothing) == []
    found = entries(tmp_path / "diff.tar")
    assert {"directory", f"directory/{long}", "directory/outside", "not utf-8 \udcff", "one", "two"} == set(found)
    assert (found["directory/outside"].type, found["directory/outside"].linkname) == (tarfile.SYMTYPE, "/etc/shadow")
    assert (found["two"].type, found["two"].linkname) == (tarfile.LNKTYPE, "one")
    assert found["one"].mode == 0o4755
    assert {entry.uname for entry in found.values()} == {""}


@pytest.mark.parametrize("other", ["link", "shorter"])
def test_a_file_that_is_replaced_while_it_is_looked_at(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that shares the process namespace can reach it, and logs are rotated: size and content are of one."""
    upper, secret = tmp_path / "upper", tmp_path / "secret"
    upper.mkdir()
    (upper / "file").write_bytes(b"its own content")
    secret.write_bytes(b"of somebody else")
    look = tarfile.TarFile.gettarinfo

    def replaced(self: tarfile.TarFile, *args: Any) -> Any:
        entry = look(self, *args)
        (upper / "file").unlink()
        if other == "link":
            (upper / "file").symlink_to(secret)
        else:
            (upper / "file").touch()
        return entry

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", replaced)
    checkpoint_archive.write_diff(str(upper), str(tmp_path / "diff.tar"), None, nothing)
    with tarfile.open(tmp_path / "diff.tar") as tar:
        content = tar.extractfile("file")
        assert content is not None
        assert content.read() == b"its own content"


@pytest.mark.parametrize(("first", "length", "seen"), [(0, 1, 0), (-5, 10, 5), (1, 10, 65534), (-5, 5, 65534)])
def test_the_owners_in_a_diff_are_those_that_the_pod_sees(tmp_path: Path, first: int, length: int, seen: int) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "file").touch()
    ids = IdMapping(container_id=0, host_id=os.getuid() + first, length=length)
    groups = IdMapping(container_id=7, host_id=os.getgid(), length=1)
    user = UserNamespace(ids, groups)
    checkpoint_archive.write_diff(str(tmp_path / "upper"), str(tmp_path / "diff.tar"), user, nothing)
    entry = entries(tmp_path / "diff.tar")["file"]
    assert (entry.uid, entry.gid) == (seen, 7)


def test_a_large_file_can_be_cut_off_in_its_middle(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "large").write_bytes(b"x" * (10 << 20))
    with pytest.raises(InterruptedError):
        checkpoint_archive.write_diff(str(tmp_path / "upper"), str(tmp_path / "diff.tar"), None, Ends(4))
    assert 1 << 20 <= (tmp_path / "diff.tar").stat().st_size <= 6 << 20


@pytest.mark.parametrize("log", ["there", "gone", "none"])
def test_the_archive_has_the_log_where_there_is_one(tmp_path: Path, log: str) -> None:
    (tmp_path / "content" / "checkpoint").mkdir(parents=True)
    (tmp_path / "content" / "status").write_text("{}")
    if log == "there":
        (tmp_path / "c.log").write_text("line\n")
    path = "" if log == "none" else str(tmp_path / "c.log")
    checkpoint_archive.write_archive(str(tmp_path / "content"), path, str(tmp_path / "a.tar"), nothing)
    expected = {"checkpoint", "status"} | ({"container.log"} if log == "there" else set())
    assert set(entries(tmp_path / "a.tar")) == expected


def test_an_upper_layer_is_archived_however_deep_it_is(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    nest(upper, 3000)
    try:
        assert checkpoint_archive.write_diff(str(upper), str(tmp_path / "diff.tar"), None, nothing) == []
        deepest = "/".join(["dd"] * 3000) + "/bottom"
        found = entries(tmp_path / "diff.tar")
        assert len(found) == 3001
        assert found[deepest].isfile()
        # Each entry has its whole path: these would be more than what they are of.
        nest(upper, 6000, "deeper")
        with pytest.raises(FailedPreconditionError, match=r"'deeper/dd.*….*dd' has a path of more than 16384"):
            checkpoint_archive.write_diff(str(upper), str(tmp_path / "diff.tar"), None, nothing)
    finally:
        removal.remove_path(str(upper))


def nest(top: Path, depth: int, first: str = "dd") -> None:
    fd = os.open(top, os.O_RDONLY)
    for number in range(depth):
        name = "dd" if number else first
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
