"""Parses the texts of cgroup and proc files; no I/O.

Nothing here raises: a value that is missing or malformed is None or absent. All numbers are below 2**64, so each fits a
CRI field. Formats: the kernel's
Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst, accounting/psi.rst, and proc(5) for net/dev.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# v1 writes "no limit" as the largest multiple of a page in 63 bits; v2 writes "max".
_UNLIMITED = 1 << 62
# Every number with so many digits fits 64 bits.
_MAX_DIGITS = 19
# A line of a PSI file. It is read three times for each cgroup, and one match takes a quarter of the time of splitting.
_AVERAGE = rb"(\d{1,9}\.\d{1,9})"
_STALL = re.compile(
    rb"^(some|full) avg10=%b avg60=%b avg300=%b total=(\d{1,19})\b" % (_AVERAGE, _AVERAGE, _AVERAGE), re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Stall:
    """The time for which tasks were stalled: percentages over 10, 60 and 300 s, and nanoseconds in all."""

    avg10: float
    avg60: float
    avg300: float
    total_ns: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """Stalls of at least one task (``some``), and of all tasks at once (``full``)."""

    some: Stall | None
    full: Stall | None


@dataclass(frozen=True, slots=True)
class DeviceIo:
    """Reads from and writes to a block device since the cgroup was made."""

    major: int
    minor: int
    read_bytes: int = 0
    write_bytes: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True)
class InterfaceCounters:
    """A network interface's counters."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def number(text: bytes) -> int | None:
    """A number alone in its file, with or without spaces around it; None for "max" and for any other text."""
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else None


def limit(text: bytes) -> int | None:
    """A limit in bytes or tasks; None where there is none."""
    parsed = number(text)
    return parsed if parsed is not None and parsed < _UNLIMITED else None


def pairs(text: bytes) -> dict[bytes, bytes]:
    """A flat keyed file ("KEY VALUE" lines, such as memory.stat). Values are not parsed: few of them are needed."""
    tokens = text.split()
    return dict(zip(tokens[::2], tokens[1::2], strict=False))


def value(fields: Mapping[bytes, bytes], key: bytes, scale: int = 1) -> int | None:
    """A number of :func:`pairs`, times ``scale``."""
    parsed = number(fields.get(key, b""))
    return None if parsed is None else min(parsed * scale, 2**64 - 1)


def numbers(text: bytes) -> list[int]:
    """A number on each line, such as cgroup.procs. Other lines are left out."""
    return [parsed for line in text.splitlines() if (parsed := number(line)) is not None]


def pressure(text: bytes) -> Pressure | None:
    """A PSI file: "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" in microseconds, and the same for "full"."""
    stalls = {
        kind: Stall(float(avg10), float(avg60), float(avg300), min(int(total) * 1000, 2**64 - 1))
        for kind, avg10, avg60, avg300, total in _STALL.findall(text)
    }
    some, full = stalls.get(b"some"), stalls.get(b"full")
    return Pressure(some, full) if some or full else None


def io_stat(text: bytes) -> tuple[DeviceIo, ...]:
    """v2's io.stat: "8:0 rbytes=0 wbytes=0 rios=0 wios=0 dbytes=0 dios=0", a line for each device.

    A device without counters has neither them nor the end of its line. So the counters are those of the last device.
    """
    devices = []
    for line in text.splitlines():
        fields = [field.partition(b"=") for field in line.split()]
        names = [name for name, equals, _ in fields if not equals]
        if not names or len(names) == len(fields) or (major_minor := _device(names[-1])) is None:
            continue
        values = {name: count for name, _, count in fields}
        counts = [value(values, key) or 0 for key in (b"rbytes", b"wbytes", b"rios", b"wios")]
        devices.append(DeviceIo(*major_minor, *counts))
    return tuple(devices)


def blkio(service_bytes: bytes, serviced: bytes) -> tuple[DeviceIo, ...]:
    """v1's blkio.throttle.io_service_bytes and io_serviced: "8:0 Read 4096" lines, and a total at the end."""
    sizes, counts = _blkio(service_bytes), _blkio(serviced)
    devices = sorted({device for device, _ in (*sizes, *counts)})
    return tuple(
        DeviceIo(
            *device,
            *(of.get((device, operation), 0) for of in (sizes, counts) for operation in (b"Read", b"Write")),
        )
        for device in devices
    )


def _blkio(text: bytes) -> dict[tuple[tuple[int, int], bytes], int]:
    amounts = {}
    for line in text.splitlines():
        match line.split():
            case [device, operation, count] if (at := _device(device)) and (amount := number(count)) is not None:
                amounts[at, operation] = amount
    return amounts


def _device(text: bytes) -> tuple[int, int] | None:
    major, minor = (number(part) for part in text.partition(b":")[::2])
    return None if major is None or minor is None else (major, minor)


def interfaces(text: bytes) -> Iterator[InterfaceCounters]:
    """/proc/net/dev without the loopback interface."""
    for line in text.splitlines():
        name, colon, rest = line.rpartition(b":")
        if not colon or name.strip() == b"lo":
            continue
        counts = [number(field) for field in rest.split()]
        known = [count for count in counts if count is not None]
        if len(known) == len(counts) == 16:
            yield InterfaceCounters(name.strip().decode(errors="replace"), *known[:4], *known[8:12])
