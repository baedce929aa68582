"""The kernel's list of mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshotter import mounts


@pytest.mark.parametrize(
    ("written", "point"),
    [
        (b"/mnt", "/mnt"),
        (b"/my\\040disk\\134", "/my disk\\"),
        (b"/disk-\xe9", os.fsdecode(b"/disk-\xe9")),
        # Python's text methods take these for white space and ends of lines: NEL, a no-break space, a line separator.
        ("/a\x85b\xa0c\u2028d".encode(), "/a\x85b\xa0c\u2028d"),
        (b"/a\rb\x0bc", "/a\rb\x0bc"),
    ],
)
def test_a_mount_point_may_have_any_bytes(written: bytes, point: str, tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(
        b"36 35 98:0 / %b rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue\n"
        b"37 35 98:1 / /next ro - tmpfs  rw,size=1k\n" % written  # a mount without a source
    )
    first, second = mounts.entries(str(path))
    assert (first.number, first.point, first.kind) == (36, point, "ext3")
    assert first.options == ("rw", "noatime")
    assert first.tags == ("shared:1", "master:2")
    assert first.file_system_options == ("rw", "errors=continue")
    assert (second.point, second.kind, second.file_system_options) == ("/next", "tmpfs", ("rw", "size=1k"))
    assert second.tags == ()
