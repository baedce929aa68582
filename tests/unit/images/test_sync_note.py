"""The note of what is on disk: what it says after each kind of boot, and how it is read and written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver.boot import boot_id
from criserver.images import sync_note
from criserver.images.sync_note import Note


@pytest.mark.parametrize(
    ("note", "boot", "unclean"),
    [
        (None, "b", False),
        (Note("b"), "b", False),
        (Note("a"), "b", True),
        (Note(""), "b", True),
    ],
    ids=["no note", "the daemon alone has ended", "another boot", "unchecked since an earlier boot"],
)
def test_which_start_has_suspects(note: Note | None, boot: str, unclean: bool) -> None:
    assert sync_note.is_unclean(note, boot) is unclean


def test_the_boot_has_an_id() -> None:
    assert len(boot_id()) == 36


def test_a_note_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "note")
    for note in (Note("a", {"sha256:1": "2.3"}, {"chain": "4.5"}), Note("b")):
        sync_note.write(path, note)
        assert sync_note.read(path) == note
    assert os.listdir(tmp_path) == ["note"]


def test_no_note_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "note"
    assert sync_note.read(str(path)) is None
    for text in ("", "[]", '{"boot": "b"}', '{"boot": "b", "blobs": 1, "layers": {}}'):
        path.write_text(text)
        assert sync_note.read(str(path)) == Note()


def test_a_file_that_replaces_another_has_another_stamp(tmp_path: Path) -> None:
    path, new = str(tmp_path / "file"), str(tmp_path / "new")
    assert sync_note.stamp(path) == ""
    found = set()
    for _ in range(3):
        Path(new).write_bytes(b"same")
        os.rename(new, path)
        found.add(sync_note.stamp(path))
        assert sync_note.stamp(path) in found
    assert len(found) == 3
