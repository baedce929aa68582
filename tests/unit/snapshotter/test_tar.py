"""The tar reader with archives of the standard library's writer, and with broken ones."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import LayerError, TruncatedLayerError
from snapshotter.limits import LayerLimits
from snapshotter.tar import BLOCK_DEVICE, CHARACTER, DIRECTORY, FIFO, FILE, LINK, SYMLINK, Entry, TarReader

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pieces(data: bytes, size: int) -> Callable[[], bytes]:
    file = io.BytesIO(data)
    ended = False

    def piece() -> bytes:
        nonlocal ended
        assert not ended, "read behind the end"
        found = file.read(size)
        ended = not found
        return found

    return piece


def read(data: bytes, size: int = 10_000, limits: LayerLimits | None = None) -> list[tuple[Entry, bytes]]:
    reader = TarReader(pieces(data, size), limits or LayerLimits())
    return [(entry, b"".join(reader.content())) for entry in reader]


def archive(*members: tuple[tarfile.TarInfo, bytes], layout: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def member(name: str, type_: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = type_
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def patched(data: bytes, start: int, field: bytes) -> bytes:
    """The archive with a field of its first header replaced and the checksum made right again."""
    header = bytearray(data[:512])
    header[start : start + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_kinds_and_fields_are_read_in_every_format(layout: int) -> None:
    data = archive(
        (member("dir/", tarfile.DIRTYPE, mode=0o1755, uid=7, gid=8, mtime=1000), b""),
        (member("dir/file", mode=0o4711, uid=1, gid=2, mtime=2000), b"x" * 1000),
        (member("soft", tarfile.SYMTYPE, linkname="dir/file"), b""),
        (member("hard", tarfile.LNKTYPE, linkname="dir/file"), b""),
        (member("pipe", tarfile.FIFOTYPE), b""),
        (member("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("loop", tarfile.BLKTYPE, devmajor=7, devminor=300), b""),
        layout=layout,
    )
    found = read(data)
    assert [(e.kind, e.name.rstrip(b"/"), e.link) for e, _ in found] == [
        (DIRECTORY, b"dir", b""),
        (FILE, b"dir/file", b""),
        (SYMLINK, b"soft", b"dir/file"),
        (LINK, b"hard", b"dir/file"),
        (FIFO, b"pipe", b""),
        (CHARACTER, b"null", b""),
        (BLOCK_DEVICE, b"loop", b""),
    ]
    assert [entry.device for entry, _ in found[-3:]] == [0, os.makedev(1, 3), os.makedev(7, 300)]
    directory, file = found[0][0], found[1][0]
    assert (directory.mode, directory.uid, directory.gid, directory.mtime) == (0o1755, 7, 8, 1000 * 10**9)
    assert (file.mode, file.uid, file.gid, file.size) == (0o4711, 1, 2, 1000)
    assert found[1][1] == b"x" * 1000


names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120), min_size=1, max_size=4
).map("/".join)
files = st.tuples(
    names,
    st.binary(max_size=3000),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**40),
)


@settings(max_examples=60)
@given(
    st.lists(files, max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(1, 5000),
)
def test_what_is_written_is_read_in_pieces_of_any_size(
    members: list[tuple[str, bytes, int, int, int]], layout: int, size: int
) -> None:
    data = archive(
        *((member(n, mode=m, uid=u, gid=u, mtime=t), content) for n, content, m, u, t in members),
        layout=layout,
    )
    found = [(e.name.decode(), content, e.mode, e.uid, e.mtime // 10**9) for e, content in read(data, size)]
    assert found == members


@settings(max_examples=300)
@given(st.integers(0, 1535), st.binary(min_size=1, max_size=40), st.booleans())
def test_any_damage_ends_in_entries_or_in_a_layer_error(at: int, junk: bytes, fixed: bool) -> None:
    data = archive((member("a" * 150, mtime=1.5), b"content"))
    data = data[:at] + junk + data[at + len(junk) :]
    if fixed:
        data = patched(data, 0, b"")
    try:
        read(data)
    except LayerError:
        pass


def test_ustar_prefix_is_joined() -> None:
    name = "d" * 120 + "/" + "f" * 90
    assert read(archive((member(name), b""), layout=tarfile.USTAR_FORMAT))[0][0].name == name.encode()


@pytest.mark.parametrize("version", [b"\0\0", b"  "])
def test_ustar_prefix_is_joined_whatever_the_version_is(version: bytes) -> None:
    name = "d" * 120 + "/" + "f" * 90
    data = patched(archive((member(name), b""), layout=tarfile.USTAR_FORMAT), 263, version)
    assert read(data)[0][0].name == name.encode()


def test_the_time_of_gnus_header_is_no_prefix() -> None:
    data = patched(archive((member("f"), b""), layout=tarfile.GNU_FORMAT), 345, b"14012345670\0")
    assert read(data)[0][0].name == b"f"


def test_a_time_that_no_kernel_can_keep_is_the_epoch() -> None:
    data = archive((member("file", mtime=17), b""))
    assert read(patched(data, 136, b"\x80\0\0\0\x7f" + b"\xff" * 7))[0][0].mtime == 0
    assert read(archive((member("file", pax_headers={"mtime": "-9223372036854775807.5"}), b"")))[0][0].mtime == 0


def test_long_names_and_links_of_gnu() -> None:
    data = archive(
        (member("n" * 300, tarfile.SYMTYPE, linkname="l" * 400), b""),
        (member("short"), b""),
        layout=tarfile.GNU_FORMAT,
    )
    first, second = (entry for entry, _ in read(data))
    assert (first.name, first.link) == (b"n" * 300, b"l" * 400)
    assert (second.name, second.link) == (b"short", b"")


def test_pax_records_override_the_header_for_one_entry() -> None:
    records = {
        "path": "né",
        "uid": "5",
        "gid": "6",
        "mtime": "-1.25",
        "SCHILY.xattr.user.colour": "red",
    }
    data = archive((member("x", pax_headers=records), b"abc"), (member("y", mtime=3), b""))
    first, second = (entry for entry, _ in read(data))
    assert (first.name, first.uid, first.gid, first.mtime) == ("né".encode(), 5, 6, -1_250_000_000)
    assert first.xattrs == {b"user.colour": b"red"}
    assert (second.name, second.uid, second.mtime, second.xattrs) == (b"y", 0, 3 * 10**9, {})


def test_global_pax_records_say_nothing_of_the_entries() -> None:
    """So it is with the readers of other runtimes, and of the scanners of images."""
    file = io.BytesIO()
    records = {"uid": "9", "path": "other", "size": "7", "comment": "a commit"}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
        tar.addfile(member("a"))
        tar.addfile(member("b", pax_headers={"uid": "3"}))
        tar.addfile(member("c"))
    found = [(entry.name, entry.uid, entry.size) for entry, _ in read(file.getvalue())]
    assert found == [(b"a", 0, 0), (b"b", 3, 0), (b"c", 0, 0)]


def test_pax_size_beyond_the_header_field() -> None:
    data = archive((member("x", pax_headers={"size": "600"}), b"s" * 600))
    # The header's own size is 600, too; with a wrong one there the record must win.
    header_at = 1024
    data = data[:header_at] + patched(data[header_at:], 124, b"00000000000\0")
    assert read(data)[0][1] == b"s" * 600


def test_base_256_numbers() -> None:
    data = archive((member("x", uid=2**31, mtime=-5), b""), layout=tarfile.GNU_FORMAT)
    entry = read(data)[0][0]
    assert (entry.uid, entry.mtime) == (2**31, -5 * 10**9)


@pytest.mark.parametrize(
    ("field", "uid"),
    [
        (b"0000017\0", 0o17),
        (b"    17 \0", 0o17),
        (b"17\0junk!", 0o17),
        (b"17 \0\xff\x01", 0o17),
        (b"\0\x0017 \0 ", 0o17),
        (b"\0" * 8, 0),
        (b"\xff" * 8, 0),  # -1: chown(2) would leave a new file to root
        (b"\xff" * 7 + b"\xfe", 2**32 - 2),
        (b"\x80\0\0\0\xff\xff\xff\xff", 0),
    ],
)
def test_numbers_as_go_reads_them(field: bytes, uid: int) -> None:
    # The last byte is not the end of the field: rubbish may follow the zero byte.
    assert read(patched(archive((member("x"), b"")), 108, field.ljust(8, b"\0")[:8]))[0][0].uid == uid


@pytest.mark.parametrize(
    ("key", "value", "name", "wanted"),
    [
        ("mtime", "+17", "mtime", 17 * 10**9),
        ("mtime", "+17.5", "mtime", 17_500_000_000),
        ("mtime", "-0.5", "mtime", -500_000_000),
        ("mtime", "17.", "mtime", 17 * 10**9),
        ("uid", "-2", "uid", 2**32 - 2),
        ("gid", "-1", "gid", 0),
        ("uid", "+5", "uid", 5),
    ],
)
def test_numbers_of_records_may_have_a_sign(key: str, value: str, name: str, wanted: int) -> None:
    entry = read(archive((member("x", pax_headers={key: value}), b"")))[0][0]
    assert getattr(entry, name) == wanted


def test_directory_of_before_ustar() -> None:
    assert read(patched(archive((member("old/"), b"")), 156, b"\0"))[0][0].kind == DIRECTORY


def test_a_signed_checksum_is_accepted() -> None:
    data = bytearray(archive((member("é" * 10), b""), layout=tarfile.GNU_FORMAT))
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in data[:512])
    assert read(bytes(data))[0][0].name == ("é" * 10).encode()


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(archive((member("file"), b"")))
    data[0] ^= 1
    with pytest.raises(LayerError, match="checksum"):
        read(bytes(data))


def test_truncation_within_an_entry_is_told_at_every_block() -> None:
    data = archive(
        (member("a", pax_headers={"comment": "x" * 600}), b"1" * 700),
        (member("b"), b"2" * 1500),
        (member("c", tarfile.DIRTYPE), b""),
    )
    end = data.index(bytes(1024), 512 * 12)
    boundaries = set()
    for at in range(512, end + 512, 512):
        try:
            found = read(data[:at])
        except TruncatedLayerError:
            continue
        boundaries.add(at)
        assert sum(512 + -(-len(content) // 512) * 512 for _, content in found) <= at
    # After each of the three entries a stream may end, and between the two blocks of zeros; nowhere else.
    assert len(boundaries) == 4
    for at in range(1, 512, 73):
        with pytest.raises(TruncatedLayerError):
            read(data[:at])


@pytest.mark.parametrize(
    ("start", "field", "told"),
    [
        (124, b"\xff" * 12, "size -1 is negative"),
        (124, b"-0000000001\0", "octal"),
        (124, b"00000000089\0", "octal"),
        (124, b"0o000000017\0", "octal"),
        (108, b"\x80" + b"\xff" * 7, "owner .* out of range"),
        (108, b"644 x\0\0\0", "octal"),
        (108, b"+000644\0", "octal"),
        (136, b"\x80" + b"\xff" * 11, "time .* out of range"),
        (156, b"V", "unknown type"),
    ],
)
def test_a_field_out_of_its_range_is_refused(start: int, field: bytes, told: str) -> None:
    data = patched(archive((member("file"), b"")), start, field)
    with pytest.raises(LayerError, match=told):
        read(data)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (b"11 size=-1\n", "size"),
        (b"12 size=1_0\n", "size"),
        (b"99 path=x\n", "broken"),
        (b"8 path=x\n", "broken"),
        (b"3 x\n", "broken"),
        (b"path=x\n", "length"),
        (b"12 path=a\0b\n", "zero byte"),
        (b"15 mtime=noon!\n", "time"),
        (b"12 mtime=++1\n", "time"),
        (b"14 mtime=1_000\n", "time"),
        (b"10 mtime=+\n", "time"),
        (b"22 GNU.sparse.major=2\n", "unknown format"),
    ],
)
def test_a_broken_pax_record_is_refused(record: bytes, told: str) -> None:
    with pytest.raises(LayerError, match=told):
        read(extended(b"x", record) + archive((member("file"), b"")))


def extended(flag: bytes, data: bytes) -> bytes:
    content = data + bytes(-len(data) % 512)
    return patched(archive((member("header"), data), layout=tarfile.USTAR_FORMAT)[:512], 156, flag) + content


def test_an_extended_header_without_its_entry_is_truncated() -> None:
    with pytest.raises(TruncatedLayerError, match="extended header"):
        read(extended(b"x", b"9 path=x\n") + bytes(1024))


def test_sizes_of_extended_headers_are_bounded_before_they_are_read() -> None:
    for flag, size in ((b"L", 5000), (b"x", 2 << 20)):
        data = patched(extended(flag, b"x" * 10), 124, b"%011o\0" % size)
        with pytest.raises(LayerError, match="allowed"):
            read(data)


def test_limits_on_entries_and_names() -> None:
    data = archive(*((member(f"{n}"), b"") for n in range(4)))
    assert len(read(data, limits=LayerLimits(max_entries=4))) == 4
    with pytest.raises(LayerError, match="more than 3 entries"):
        read(data, limits=LayerLimits(max_entries=3))
    with pytest.raises(LayerError, match="name of more than 10 bytes"):
        read(archive((member("n" * 11), b"")), limits=LayerLimits(max_name=10))


def test_a_lone_block_of_zeros_is_refused() -> None:
    one = archive((member("a"), b""))[:512]
    with pytest.raises(LayerError, match="zeros"):
        read(one + bytes(512) + one)


@pytest.mark.parametrize("size", [1, 7, 512, 10_000])
@pytest.mark.parametrize("content", [b"", b"x", b"x" * 511, b"x" * 512, b"x" * 700])
def test_an_archive_may_end_anywhere_behind_its_last_content(content: bytes, size: int) -> None:
    data = archive((member("first"), b"1"), (member("last"), content))
    end = 1024 + 512 + len(content)
    for at in {end, end + 1, -(-end // 512) * 512, -(-end // 512) * 512 + 100, -(-end // 512) * 512 + 512, end + 1000}:
        assert [entry.name for entry, _ in read(data[:at], size)] == [b"first", b"last"]
    if content:
        with pytest.raises(TruncatedLayerError):
            read(data[: end - 1], size)
    with pytest.raises(TruncatedLayerError):
        read(data[: -(-end // 512) * 512] + b"next" + bytes(100), size)


def test_nothing_is_read_as_an_entry_after_the_end() -> None:
    one = archive((member("a"), b""))
    assert len(read(one + one)) == 1


def test_drain_reads_to_the_end_of_the_stream() -> None:
    file = io.BytesIO(archive((member("a"), b"")) + b"more" * 1000)
    reader = TarReader(lambda: file.read(700), LayerLimits())
    for _ in reader:
        pass
    reader.drain()
    assert file.read() == b""


def test_an_empty_stream_has_no_entries() -> None:
    assert read(b"") == []
