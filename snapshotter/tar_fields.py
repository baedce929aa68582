"""The fields of a tar header and the records of a PAX header: from untrusted bytes to checked values.

Formats: ustar, GNU's base-256 numbers, and PAX (POSIX.1-2001 pax interchange format). All functions raise LayerError.
"""

from __future__ import annotations

import os
import re

from snapshotter.errors import LayerError, shown

SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_DECIMAL = re.compile(rb"\+?[0-9]{1,20}")
_SIGNED = re.compile(rb"[+-]?[0-9]{1,20}")
_CHECKSUM = slice(148, 156)
_MAX_DEVICE = (1 << 12) - 1, (1 << 20) - 1  # major and minor, as the kernel keeps them
_IDS = 1 << 32
_UNCHANGED = _IDS - 1  # chown(2) takes this number for "leave the owner as it is"
_MAX_SECONDS = 1 << 55


def verify_checksum(header: bytes) -> None:
    """Check a header's checksum against its bytes."""
    field = header[_CHECKSUM]
    # The sum counts the checksum field itself as eight spaces.
    total = sum(header) - sum(field) + 256
    told = parse_number(field, "checksum")
    if told != total:
        # Some old tools add signed bytes.
        signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
        if told != signed:
            raise LayerError(f"a header's checksum is wrong: it says {told}, and the sum is {total}")


def parse_number(field: bytes, what: str) -> int:
    """A header's number: octal digits, or base-256 (two's complement) where the first bit is set.

    A zero byte ends the digits. Some writers leave rubbish behind it.
    """
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") - (1 << bits)
        return value - (1 << bits) if field[0] & 0x40 else value
    digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise LayerError(f"its {what} {shown(digits)} is not an octal number")


def parse_decimal(value: bytes, what: str) -> int:
    """A PAX record's number of bytes, in decimal digits. As for Go, a plus sign may stand before them."""
    if _DECIMAL.fullmatch(value) is None:
        raise LayerError(f"its {what} {shown(value)} is not a number of bytes")
    return int(value)


def parse_size(field: bytes, record: bytes | None) -> int:
    """A size in bytes; the PAX ``record`` goes before the header's ``field``, here and below."""
    size = parse_decimal(record, "size") if record else parse_number(field, "size")
    if size < 0:
        raise LayerError(f"its size {size} is negative")
    return size


def parse_identity(field: bytes, record: bytes | None, what: str) -> int:
    """The number of a user or group.

    A negative number means what chown(2) makes of it: its 32 bits without a sign. The number -1, "unchanged", leaves a
    new file to root.
    """
    if record and _SIGNED.fullmatch(record) is None:
        raise LayerError(f"its {what} {shown(record)} is not the number of a user or group")
    number = int(record) if record else parse_number(field, what)
    if number >= _IDS:
        raise LayerError(f"its {what} {number} is out of range")
    number %= _IDS
    return 0 if number == _UNCHANGED else number


def parse_device(major: bytes, minor: bytes) -> int:
    """The number of a device, as the kernel has it."""
    numbers = parse_number(major, "major number"), parse_number(minor, "minor number")
    if not all(0 <= number <= limit for number, limit in zip(numbers, _MAX_DEVICE, strict=True)):
        raise LayerError(f"its device number {numbers[0]}:{numbers[1]} is out of range")
    return os.makedev(*numbers)


def parse_time(field: bytes, record: bytes | None) -> int:
    """Nanoseconds since the epoch, from whole seconds or from a PAX record such as ``-1.25`` or ``+17``.

    A time that no kernel can keep is the epoch, as in containerd. One of more than 64 bits is refused, as by Go.
    """
    if record:
        whole, _, fraction = record.partition(b".")
        if _SIGNED.fullmatch(whole) is None or (fraction and not fraction.isdigit()):
            raise LayerError(f"its time {shown(record)} is not a number")
        seconds = abs(int(whole))
        nanoseconds = seconds * 10**9 + int(fraction[:9].ljust(9, b"0"))
        nanoseconds = -nanoseconds if whole.startswith(b"-") else nanoseconds
    else:
        seconds = parse_number(field, "time")
        nanoseconds = seconds * 10**9
    if abs(seconds) >= 1 << 63:
        raise LayerError(f"its time {seconds} is out of range")
    return nanoseconds if abs(seconds) <= _MAX_SECONDS else 0


def parse_pax_records(data: bytes) -> dict[bytes, bytes]:
    """The ``LENGTH KEY=VALUE\\n`` records of a PAX header. LENGTH is in bytes and counts the whole record."""
    records = {}
    pairs: list[bytes] = []  # sparse format 0.0 repeats these two keys
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        length = data[at:space]
        if space < 0 or not length.isdigit():
            raise LayerError("a PAX record has no length")
        end = at + int(length)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1] != 0x0A or not equals or not key:
            raise LayerError(f"a PAX record is broken: {shown(data[at : at + 40])}")
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2] or b"," in value:
                raise LayerError("a sparse file's map is not in order")
            pairs.append(value)
        records[key] = value
        at = end
    if pairs:
        records[SPARSE_MAP] = b",".join(pairs)
    return records
