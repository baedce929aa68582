"""Any bytes as a layer's tar stream, cut anywhere: the result is entries within their bounds, or a LayerError."""

from __future__ import annotations

from unittest import mock

from snapshotter import LayerError, LayerLimits, tar
from snapshotter.tar import Entry, TarReader

LIMITS = LayerLimits(max_entries=50, max_bytes=1 << 20, max_name=300)


def check(data: bytes) -> None:
    """The first byte says how the bytes are cut, and whether checksums count; the rest is the stream."""
    if not data:
        return
    size, checked, data = data[0] % 127 + 1, data[0] < 128, data[1:]
    if checked:
        compare(data, size)
    else:
        with mock.patch.object(tar, "_verify", lambda _: None):
            compare(data, size)


def compare(data: bytes, size: int) -> None:
    whole, cut = read(data, len(data)), read(data, size)
    assert whole == cut
    entries, error = whole
    assert len(entries) <= LIMITS.max_entries
    # A stream that ended in the middle of an entry is told.
    assert error or sum(512 + len(content) for _, content in entries) <= len(data)


def read(data: bytes, size: int) -> tuple[list[tuple[Entry, bytes]], str]:
    """The entries, each checked, with their content, and the error that ended them."""
    pieces = iter([data[at : at + size] for at in range(0, len(data), max(size, 1))])
    reader = TarReader(lambda: next(pieces, b""), LIMITS)
    found = []
    try:
        for entry in reader:
            content = b"".join(reader.content())
            check_entry(entry, content)
            found.append((entry, content))
    except LayerError as e:
        assert len(str(e)) < 1000
        assert str(e).isprintable()
        return found, f"{type(e).__name__}: {e}"
    return found, ""


def check_entry(entry: Entry, content: bytes) -> None:
    assert len(entry.name) <= LIMITS.max_name
    assert len(entry.link) <= LIMITS.max_name
    assert b"\0" not in entry.name + entry.link
    assert 0 <= entry.mode <= 0o7777
    assert 0 <= entry.uid < 2**32 - 1
    assert 0 <= entry.gid < 2**32 - 1
    assert abs(entry.mtime) < 2**55 * 10**9 + 10**9
    assert 0 <= entry.size <= LIMITS.max_bytes
    assert entry.kind is tar.FILE or not content
    if entry.extents is None:
        assert entry.size == len(content)
    else:
        assert entry.kind is tar.FILE
        ends = [0, *(offset + length for offset, length in entry.extents)]
        assert all(end <= offset for end, (offset, _) in zip(ends, entry.extents, strict=False))
        assert ends[-1] <= entry.size
        assert sum(length for _, length in entry.extents) == len(content)
