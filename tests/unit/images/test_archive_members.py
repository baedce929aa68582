"""Headers of archives that no tool writes."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.images.archive_members import Member, read_members
from snapshotter.limits import LayerLimits


def header(name: str = "a", kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> bytes:
    """A header with a size that may be negative: GNU's format keeps it in base 256."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(kind: bytes, **records: str) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(records, kind, "utf-8")  # type: ignore[attr-defined]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[io.FileIO]:
    with io.FileIO(tmp_path / "a.tar", "w+") as file:
        yield file


def members(archive: io.FileIO) -> dict[str, Member]:
    return read_members(archive.fileno(), "archive a", LayerLimits())


def test_where_the_members_are(archive: io.FileIO) -> None:
    archive.write(pax(tarfile.XHDTYPE, path="./b/long") + header(size=700) + bytes(1024))
    archive.write(header("b/", tarfile.DIRTYPE) + header("b/link", tarfile.SYMTYPE, target="../c"))
    archive.write(header("c", size=3) + b"abc")  # without padding, and without an end
    assert members(archive) == {
        "b/long": Member(700, 1536, True, None),
        "b": Member(0, 3072, False, None),
        "b/link": Member(0, 3584, False, "c"),
        "c": Member(3, 4096, True, None),
    }


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-1000, 1 << 40])
def test_a_size_that_no_header_has_takes_no_memory(archive: io.FileIO, kind: bytes, size: int) -> None:
    archive.write(header() + header("b", kind, size))
    os.truncate(archive.fileno(), 64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError, match=r"^archive a is damaged: "):
            members(archive)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_global_headers_are_not_kept_for_each_member(archive: io.FileIO) -> None:
    archive.write(pax(tarfile.XGLTYPE, **{f"k{n}": "" for n in range(5000)}))
    archive.write(header() * 1000)
    tracemalloc.start()
    try:
        assert len(members(archive)) == 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_tar_file(archive: io.FileIO) -> None:
    archive.write(b"no tar file" * 100)
    with pytest.raises(InvalidArgumentError, match=r"^archive a is no tar file: "):
        members(archive)
