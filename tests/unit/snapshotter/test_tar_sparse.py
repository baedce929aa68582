"""Sparse files as GNU tar writes them, in its four formats: the bytes in the stream, and their offsets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from snapshotter.errors import LayerError
from snapshotter.limits import LayerLimits
from snapshotter.tar import Entry, TarReader
from tests.support import hostile

FORMATS = {
    "old": ["--format=gnu"],
    "0.0": ["--format=pax", "--sparse-version=0.0"],
    "0.1": ["--format=pax", "--sparse-version=0.1"],
    "1.0": ["--format=pax", "--sparse-version=1.0"],
}
PAGE = 65536  # no file system has larger blocks


def read(data: bytes) -> list[tuple[Entry, bytes]]:
    pieces = iter([data[at : at + 1000] for at in range(0, len(data), 1000)])
    reader = TarReader(lambda: next(pieces, b""), LayerLimits())
    return [(entry, b"".join(reader.content())) for entry in reader]


def filled(entry: Entry, content: bytes) -> bytes:
    """The file that an entry stands for."""
    assert entry.extents is not None
    file = bytearray(entry.size)
    at = 0
    for offset, length in entry.extents:
        file[offset : offset + length] = content[at : at + length]
        at += length
    assert at == len(content)
    return bytes(file)


def archived(directory: Path, options: list[str]) -> bytes:
    command = ["tar", "-C", str(directory), "-S", *options, "-cf", "-", "--sort=name", *sorted(os.listdir(directory))]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_sparse_file_is_read_with_its_holes(tmp_path: Path, options: list[str]) -> None:
    # Thirty extents, which need further blocks of the old format; data at both ends or holes; a name that is too long.
    with open(tmp_path / "a-sparse", "wb") as file:
        for number in range(30):
            file.seek(number * 2 * PAGE)
            file.write(b"%d" % number * 100)
    with open(tmp_path / ("b" * 200), "wb") as file:
        file.truncate(10 * PAGE)
    with open(tmp_path / "c-hole-first", "wb") as file:
        file.seek(3 * PAGE)
        file.write(b"end")
    (tmp_path / "d-plain").write_bytes(b"plain")
    data = archived(tmp_path, options)
    assert len(data) < 40 * PAGE
    found = read(data)
    assert [entry.name.decode() for entry, _ in found] == sorted(os.listdir(tmp_path))
    for entry, content in found:
        whole = (tmp_path / entry.name.decode()).read_bytes()
        assert entry.size == len(whole)
        if entry.name == b"d-plain":
            assert entry.extents is None
            assert content == whole
        else:
            assert len(content) < len(whole)
            assert filled(entry, content) == whole


def test_a_format_that_is_not_known_is_refused() -> None:
    data = hostile.pax(GNU__sparse__major=b"2", GNU__sparse__minor=b"0") + hostile.file(b"f")
    with pytest.raises(LayerError, match="unknown format"):
        read(data)


def test_pairs_of_the_first_pax_format_in_the_wrong_order_are_refused() -> None:
    data = hostile.pax(GNU__sparse__numbytes=b"1", GNU__sparse__offset=b"0") + hostile.file(b"f")
    with pytest.raises(LayerError, match="not in order"):
        read(data)


def test_a_map_at_a_directory_is_refused() -> None:
    data = hostile.pax(GNU__sparse__map=b"0,1", GNU__sparse__size=b"1") + hostile.header(b"d/", b"5")
    with pytest.raises(LayerError, match="is none"):
        read(data)
