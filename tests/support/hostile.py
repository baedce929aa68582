"""Hostile layers, and layers that only look hostile, written block by block: no tar writer writes them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import zstandard

from criserver.images.manifests import OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST
from criserver.images.platforms import host_platform
from tests.support.imagebuilder import BuiltImage, add_blob, digest, vars_of

# What the daemon of these tests allows: see LIMITS.
MAX_LAYERS, MAX_ENTRIES, MAX_BYTES, MAX_RATIO, RATIO_FLOOR = 3, 1000, 8 << 20, 50, 1 << 20
LIMITS = (
    f"\n[images]\nmax_layers = {MAX_LAYERS}\nmax_entries = {MAX_ENTRIES}\nmax_bytes = {MAX_BYTES}\n"
    f"max_ratio = {MAX_RATIO}\nratio_floor = {RATIO_FLOOR}\n"
)
INVALID, EXHAUSTED, LOST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
)
END = bytes(1024)
UP = b"../../../../../canary"  # from a layer's root in the staging directory


@dataclass(frozen=True)
class Layer:
    """A blob and the digest of what is in it."""

    blob: bytes
    diff_id: str
    media_type: str = OCI_LAYER


@dataclass(frozen=True)
class Refused:
    """Layers that no image may have: with which code, and which words, it is said."""

    layers: list[Layer]
    code: grpc.StatusCode
    words: tuple[str, ...]


def header(name: bytes, kind: bytes = b"0", *, link: bytes = b"", size: bytes | int = 0, **fields: bytes) -> bytes:
    """One ustar header with a right checksum; numbers may be given as the bytes of their field."""
    numbers = {"mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "mtime": b"00000000000\0", **fields}
    sized = size if isinstance(size, bytes) else b"%011o\0" % size
    head = name.ljust(100, b"\0") + numbers["mode"] + numbers["uid"] + numbers["gid"] + sized + numbers["mtime"]
    tail = kind + link.ljust(100, b"\0") + fields.get("magic", b"ustar\x0000") + bytes(64)
    tail += fields.get("devmajor", bytes(8)) + fields.get("devminor", bytes(8))
    tail = fields.get("tail", tail).ljust(512 - 156, b"\0")
    total = fields.get("checksum", b"%06o\0 " % (sum(head) + 8 * 32 + sum(tail)))
    return head + total + tail


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def file(name: bytes, content: bytes = b"x", **fields: bytes) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)


def extended(body: bytes, kind: bytes = b"x") -> bytes:
    """A PAX header, or with L and K a long name of GNU's."""
    return header(b"extended", kind, size=len(body)) + padded(body)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def pax(**records: bytes) -> bytes:
    return extended(b"".join(record(key.replace("__", ".").encode(), value) for key, value in records.items()))


def plain(*parts: bytes) -> Layer:
    data = b"".join(parts) + END
    return Layer(data, digest(data))


def gzipped(data: bytes, blob: bytes | None = None) -> Layer:
    return Layer(gzip.compress(data) if blob is None else blob, digest(data), OCI_LAYER_GZIP)


def zstd(data: bytes, blob: bytes | None = None) -> Layer:
    return Layer(zstandard.compress(data) if blob is None else blob, digest(data), OCI_LAYER_ZSTD)


def refused(*parts: bytes | Layer, code: grpc.StatusCode = INVALID, words: str | tuple[str, ...]) -> Refused:
    layers = [part for part in parts if isinstance(part, Layer)] or [plain(*(p for p in parts if isinstance(p, bytes)))]
    return Refused(layers, code, (words,) if isinstance(words, str) else words)


def image_of(layers: list[Layer]) -> BuiltImage:
    """An image of these layers, rightly named whatever is in them."""
    platform = host_platform()
    blobs: dict[str, bytes] = {}
    configuration = {
        **{key: value for key, value in vars_of(platform).items() if value},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    config = add_blob(blobs, OCI_CONFIG, json.dumps(configuration).encode())
    described = [add_blob(blobs, layer.media_type, layer.blob) for layer in layers]
    manifest: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": described}
    return BuiltImage(blobs, add_blob(blobs, OCI_MANIFEST, json.dumps(manifest).encode()))


def sparse_1_0(numbers: bytes, content: bytes, size: bytes) -> bytes:
    body = padded(numbers) + content
    records = {"GNU__sparse__major": b"1", "GNU__sparse__minor": b"0", "GNU__sparse__realsize": size}
    return pax(**records) + header(b"sparse", size=len(body)) + padded(body)


def old_sparse(pairs: list[tuple[bytes, bytes]], size: bytes, content: bytes = b"", more: bytes = b"\0") -> bytes:
    tail = (b"S" + bytes(100) + b"ustar  \0").ljust(386 - 156, b"\0") + b"".join(a + b for a, b in pairs)
    tail = tail.ljust(482 - 156, b"\0") + more + size
    return header(b"sparse", size=len(content), tail=tail) + padded(content)


def base_256(number: int) -> bytes:
    return (number + (1 << 95) if number >= 0 else number + (1 << 96)).to_bytes(12, "big")


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def descending(depth: int) -> bytes:
    """Directories one in the other, deeper than a path can say: a symbolic link leads down each thousand."""
    parts = []
    for level in range(depth // 1000):
        below = b"%d" % level + b"/d" * 1000
        parts.append(pax(path=(b"way%d/" % (level - 1) if level else b"") + below) + header(b"x", b"5"))
        target = (b"way%d/" % (level - 1) if level else b"") + below
        parts.append(pax(linkpath=target) + header(b"way%d" % level, b"2"))
    return b"".join(parts)


def refused_layers(canary: str) -> Iterator[tuple[str, Refused]]:
    """By name; ``canary`` is a directory of the node's."""
    outside = canary.encode()
    whole = file(b"f", b"x" * 3000)
    zeros = header(b"f", size=4 << 20) + bytes(4 << 20) + END
    noise = file(b"f", b"".join(hashlib.sha256(bytes([n])).digest() for n in range(200))) + END
    yield "dotdot", refused(file(UP + b"/new"), words="leads out of the layer")
    yield "dotdot behind a directory", refused(file(b"a/../../b"), words="leads out of the layer")
    yield "dotdot in a PAX path", refused(pax(path=UP + b"/new"), file(b"f"), words="leads out of the layer")
    yield "dotdot in a long name of GNU", refused(extended(UP + b"/new", b"L"), file(b"f"), words="out of the layer")
    yield "hard link by dotdot", refused(header(b"h", b"1", link=UP + b"/file"), words="leads out of the layer")
    yield "hard link to an absolute path", refused(header(b"h", b"1", link=outside + b"/file"), words="'h'")
    yield (
        "hard link through a symbolic link",
        refused(header(b"s", b"2", link=outside), header(b"h", b"1", link=b"s/file"), words="cannot be reached"),
    )
    yield (
        "hard link into the layer below",
        refused(plain(file(b"below")), plain(header(b"h", b"1", link=b"below")), words="not in the layer"),
    )
    yield (
        "writing through a hard link to a symbolic link to itself",
        refused(header(b"s", b"2", link=b"s"), header(b"h", b"1", link=b"s"), file(b"h/f"), words="too many symbolic"),
    )
    yield "whiteout of dotdot", refused(file(b"d/.wh..."), words="names no file")
    yield "whiteout outside", refused(file(UP + b"/.wh.file"), words="leads out of the layer")
    yield "opaque mark outside", refused(file(UP + b"/.wh..wh..opq"), words="leads out of the layer")
    yield "the root as a hard link elsewhere", refused(header(b"/", b"1", link=b"f"), words="no directory")
    for name in (b"opaque", b"redirect", b"metacopy", b"origin"):
        key = "SCHILY__xattr__trusted__overlay__" + name.decode()
        yield f"overlayfs's own {name.decode()}", refused(pax(**{key: outside}), file(b"f"), words="overlayfs's own")
    yield "a file as the root", refused(file(b"."), words="no directory")
    yield "a symbolic link as the root", refused(header(b".", b"2", link=outside), words="no directory")
    yield "a zero byte in a name", refused(pax(path=b"a\0b"), file(b"f"), words="zero byte")
    yield "a name of 256 bytes", refused(pax(path=b"n" * 256), file(b"f"), words="too long")
    yield "a path of 10,000 directories", refused(pax(path=b"d/" * 10_000), file(b"f"), words="more than 4096 bytes")
    yield "a device out of range", refused(header(b"d", b"4", devmajor=b"7777777\0"), words="device number")
    yield "a socket", refused(header(b"s", b"s"), words="unknown type")
    yield "a volume label", refused(header(b"v", b"V"), words="unknown type")

    yield "a wrong checksum", refused(header(b"f", checksum=b"000000\0 "), words="checksum")
    yield "no tar at all", refused(b"#!/bin/sh\n" * 200, words="checksum")
    yield "a negative size", refused(header(b"f", size=base_256(-1)), words="negative")
    yield "a size of 2 to the 80th", refused(header(b"f", size=base_256(1 << 80)), code=EXHAUSTED, words="max_bytes")
    yield "a size that is no number", refused(header(b"f", size=b"0x000000012\0"), words="not an octal number")
    yield "a negative size in PAX", refused(pax(size=b"-1"), file(b"f"), words="not a number")
    yield "a size of PAX with another behind it", refused(pax(size=b"1_000"), file(b"f"), words="not a number")
    yield "an owner beyond the kernel's", refused(header(b"f", uid=b"\x80" + b"\xff" * 7), words="out of range")
    yield "a time after the end of time", refused(pax(mtime=b"9" * 20), file(b"f"), words="out of range")
    yield "a header cut short", refused(plain_cut(whole, 100), words="ends in the middle")
    yield "content cut short", refused(plain_cut(whole, 2000), words="ends in the middle")
    yield "a block of zeros among the entries", refused(bytes(512) + whole, words="zeros")

    for what, body in {
        "too long": b"50 path=x\n",
        "too short": b"5 path=x\n",
        "zero": b"0 path=x\n",
        "negative": b"-9 path=x\n",
        "beyond any number": b"9" * 21 + b" path=x\n",
        "without its line's end": b"8 path=x",
        "without a key": b"5 =x\n",
    }.items():
        yield f"a PAX record whose length is {what}", refused(extended(body), file(b"f"), words="PAX record")
    yield "a PAX header of 2 MiB", refused(extended(b"x" * (2 << 20)), file(b"f"), words="1048576 are allowed")
    yield "a long name of a gigabyte", refused(header(b"l", b"L", size=1 << 30), words="4097 are allowed")
    yield "extended headers without an entry", refused(pax(path=b"x"), words="before its entry")
    yield "extended headers without an end", refused(pax(path=b"x") * 100, file(b"f"), words="extended headers")
    yield (
        "global headers without an end",
        refused(extended(record(b"k", b"v"), b"g") * 100, file(b"f"), words="extended headers"),
    )

    yield (
        "a sparse file of a petabyte",
        refused(sparse_1_0(b"0\n", b"", b"%d" % (1 << 50)), code=EXHAUSTED, words=("max_bytes", str(1 << 50))),
    )
    yield (
        "a sparse file of a petabyte, of old",
        refused(old_sparse([], base_256(1 << 50)), code=EXHAUSTED, words=("max_bytes", str(1 << 50))),
    )
    for what, numbers, size in (
        ("that overlaps", b"2\n0\n4\n2\n4\n", b"100"),
        ("beyond the file", b"1\n100\n8\n", b"50"),
        ("of less than there is", b"1\n0\n4\n", b"100"),
        ("of more than there is", b"1\n0\n400\n", b"1000"),
        ("that is not there", b"1000000\n0\n4\n", b"100"),
        ("of negative numbers", b"1\n-4\n8\n", b"100"),
        ("of no numbers", b"\n" * 512, b"100"),
    ):
        yield f"a sparse file with a map {what}", refused(sparse_1_0(numbers, b"12345678", size), words="'sparse'")
    yield (
        "a sparse file with a negative map, of old",
        refused(old_sparse([(base_256(-4), octal(4))], octal(100), b"1234"), words="map"),
    )
    yield (
        "a sparse file with a map without an end, of old",
        refused(old_sparse([], octal(9), more=b"\1"), (octal(0) * 42 + b"\1" + bytes(7)) * 2100, words="map has more"),
    )

    yield "a gzip bomb", refused(gzipped(zeros), code=EXHAUSTED, words=("max_ratio", "50"))
    yield "a zstd bomb", refused(zstd(zeros), code=EXHAUSTED, words=("max_ratio", "50"))
    yield "a bomb behind the end", refused(gzipped(whole + END + bytes(4 << 20)), code=EXHAUSTED, words="max_ratio")
    yield "a gzip file in a gzip file", refused(gzipped(gzip.compress(noise)), words="checksum")
    yield "gzip data cut short", refused(gzipped(noise, gzip.compress(noise)[:-100]), words="ends")
    yield "gzip data and then something else", refused(gzipped(noise, gzip.compress(noise) + b"junk"), words="gzip")
    yield "zstd data and then something else", refused(zstd(noise, zstandard.compress(noise) + b"junk"), words="zstd")
    yield (
        "another layer than was promised",
        refused(Layer(whole + END, digest(b"another")), code=LOST, words="configuration names"),
    )
    yield (
        "something behind the end",
        refused(Layer(whole + END + b"more", digest(whole + END)), code=LOST, words="configuration names"),
    )

    many = b"".join(header(b"d%d/" % n, b"5") for n in range(MAX_ENTRIES + 1))
    yield "too many entries", refused(gzipped(many + END), code=EXHAUSTED, words=("max_entries", "1000", "[images]"))
    yield "too many bytes", refused(file(b"f", bytes(MAX_BYTES)), code=EXHAUSTED, words=("max_bytes", str(MAX_BYTES)))
    yield (
        "one entry of too many bytes",
        refused(header(b"f", size=base_256(1 << 40)), code=EXHAUSTED, words=("max_bytes", str(1 << 40))),
    )
    yield (
        "too many layers",
        refused(
            *(plain(file(b"f%d" % n)) for n in range(4)), code=EXHAUSTED, words=("4 layers", "max_layers", "[images]")
        ),
    )


def plain_cut(data: bytes, length: int) -> Layer:
    return Layer(data[:length], digest(data[:length]))


def accepted_layers(canary: str) -> Iterator[tuple[str, list[Layer]]]:
    """By name: what looks like an attack, and stays within its layer as everything does."""
    outside = canary.encode()
    harmless = file(b"f")
    for what, target in {"an absolute": outside, "a relative": UP, "a dangling": b"nowhere/at/all"}.items():
        way = header(b"way", b"2", link=target)
        yield f"writing through {what} symbolic link", [plain(way, file(b"way/file", b"mine"))]
        yield f"a whiteout through {what} symbolic link", [plain(way, file(b"way/.wh.file"))]
        yield f"an opaque mark through {what} symbolic link", [plain(way, file(b"way/.wh..wh..opq"))]
        yield f"a device through {what} symbolic link", [plain(way, header(b"way/null", b"3", devminor=b"0000003\0"))]
        yield (
            f"writing through {what} symbolic link of the layer below",
            [plain(way), plain(file(b"way/file"))],
        )
        yield (
            f"{what} symbolic link swapped in for a directory",
            [plain(header(b"way/", b"5"), file(b"way/a"), way, file(b"way/file", b"mine"), header(b"way/", b"5"))],
        )
    yield "writing over a symbolic link", [plain(header(b"s", b"2", link=outside + b"/file"), file(b"s", b"mine"))]
    yield (
        "writing over a hard link to a symbolic link",
        [plain(header(b"s", b"2", link=outside + b"/file"), header(b"h", b"1", link=b"s"), file(b"h", b"mine"))],
    )
    yield "a whiteout that looks like one of dotdot", [plain(file(b".wh.... "), harmless)]
    yield "newlines and other bytes in names", [plain(file(b"a\nb\x1b[2J\xff"), file(b"a\\b"), file(b" "))]
    yield "the same entry again and again", [plain(file(b"f") * 500)]
    yield "a directory and a file in turn", [plain((header(b"x/", b"5") + file(b"x/y") + file(b"x")) * 100)]
    yield "a fifo", [plain(header(b"fifo", b"6"))]
    yield "devices", [plain(header(b"disk", b"4", devmajor=b"0000010\0"), header(b"null", b"3", devminor=b"0000003\0"))]
    yield "trusted attributes that are nobody's", [plain(pax(SCHILY__xattr__trusted__other=b"x"), harmless)]
    yield "labels of another host", [plain(pax(SCHILY__xattr__security__selinux=b"x"), harmless)]
    yield "10,000 directories in one another", [plain(descending(10_000))]
    yield "empty gzip members", [gzipped(harmless + END, gzip.compress(b"") * 20_000 + gzip.compress(harmless + END))]
    yield "zeros behind gzip data", [gzipped(harmless + END, gzip.compress(harmless + END) + bytes(100_000))]
    yield "nothing", [Layer(b"", digest(b""))]
    yield "symbolic links in circles", [plain(header(b"a", b"2", link=b"b"), header(b"b", b"2", link=b"a"), harmless)]
