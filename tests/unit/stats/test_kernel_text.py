"""The parsers of cgroup and proc files: on captured texts, and on any text at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.stats import InterfaceCounters, Pressure, Stall, kernel_text
from criserver.stats.kernel_text import DeviceIo

NET_DEV = (
    b"Inter-|   Receive                                                |  Transmit\n"
    b" face |bytes    packets errs drop fifo frame compressed multicast|"
    b"bytes    packets errs drop fifo colls carrier compressed\n"
    b"    lo: 2204738056  103645    0    0    0     0          0         0 "
    b"2204738056  103645    0    0    0     0       0          0\n"
    b"  eth0: 3555289636   98093    1    2    0     0          0         0  "
    b"5349462   51880    3    4    0     0       0          0\n"
)


def test_numbers_and_limits() -> None:
    assert kernel_text.number(b"4452352\n") == 4452352
    assert kernel_text.number(b"max\n") is None
    assert kernel_text.number(b"") is None
    assert kernel_text.number(b"-1\n") is None
    assert kernel_text.limit(b"67108864\n") == 67108864
    assert kernel_text.limit(b"max\n") is None
    assert kernel_text.limit(b"9223372036854771712\n") is None
    assert kernel_text.number(b"9" * 5000) is None
    assert kernel_text.numbers(b"12\n7\n") == [12, 7]


def test_flat_keyed_files() -> None:
    found = kernel_text.pairs(b"usage_usec 36374\nuser_usec 0\nnr_bursts x\n")
    assert kernel_text.value(found, b"usage_usec", 1000) == 36374000
    assert kernel_text.value(found, b"user_usec") == 0
    assert kernel_text.value(found, b"nr_bursts") is None
    assert kernel_text.value(found, b"absent") is None


def test_pressure_in_nanoseconds() -> None:
    text = b"some avg10=1.50 avg60=0.25 avg300=12.00 total=538\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=497\n"
    assert kernel_text.pressure(text) == Pressure(Stall(1.5, 0.25, 12.0, 538_000), Stall(0.0, 0.0, 0.0, 497_000))
    assert kernel_text.pressure(text.splitlines()[0]) == Pressure(Stall(1.5, 0.25, 12.0, 538_000), None)
    assert kernel_text.pressure(b"") is None
    assert kernel_text.pressure(text.replace(b"538", b"9" * 20).replace(b"full", b"half")) is None
    assert kernel_text.pressure(text.replace(b"avg60=0.25", b"avg60=-")) == Pressure(
        None, Stall(0.0, 0.0, 0.0, 497_000)
    )


def test_io_of_version_2() -> None:
    text = b"254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n253:0 \n"
    assert kernel_text.io_stat(text) == (DeviceIo(254, 0, 4096, 8192, 1, 2),)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # A device without counters has no end of its line.
        (b"7:7 7:6 7:4 rbytes=1 wbytes=2 rios=3 wios=4\n", (DeviceIo(7, 4, 1, 2, 3, 4),)),
        # A cgroup that is being made.
        (b"8:0 rbytes=1\n252:0 ", (DeviceIo(8, 0, 1),)),
        # A device that the kernel has no number for, as of ZFS.
        (b"(unknown) rbytes=9\n8:0 rbytes=1\n", (DeviceIo(8, 0, 1),)),
    ],
)
def test_io_of_version_2_as_some_kernels_write_it(text: bytes, found: tuple[DeviceIo, ...]) -> None:
    assert kernel_text.io_stat(text) == found


def test_io_of_version_1() -> None:
    sizes = b"8:0 Read 4096\n8:0 Write 8192\n8:0 Sync 0\n8:0 Total 12288\n8:16 Read 1\nTotal 12289\n"
    counts = b"8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n"
    assert kernel_text.blkio(sizes, counts) == (DeviceIo(8, 0, 4096, 8192, 1, 2), DeviceIo(8, 16, 1))
    assert kernel_text.blkio(b"Total 0\n", b"Total 0\n") == ()


def test_interfaces_without_loopback() -> None:
    assert list(kernel_text.interfaces(NET_DEV)) == [
        InterfaceCounters("eth0", 3555289636, 98093, 1, 2, 5349462, 51880, 3, 4)
    ]


WORDS = (b"8:0", b"Read", b"some", b"full", b"avg10=1.0", b"avg60=1.0", b"avg300=1.0", b"total=1", b"eth0:", b"\n")
ODDITIES = (b"rbytes=", b"rbytes=7", b"max", b"1", b"9" * 19, b"9" * 20, "٣".encode(), b"=", b":", b"1.", b".1", b" ")
ANY = st.binary(max_size=200) | st.lists(st.sampled_from(WORDS + ODDITIES), max_size=40).map(b" ".join)


def _numbers_in(found: Any) -> list[int]:
    if isinstance(found, int):
        return [found]
    if isinstance(found, (list, tuple)):
        return [n for part in found for n in _numbers_in(part)]
    if hasattr(type(found), "__slots__"):
        return [n for name in type(found).__slots__ for n in _numbers_in(getattr(found, name))]
    return []


@pytest.mark.parametrize(
    "read",
    [
        kernel_text.number,
        kernel_text.limit,
        kernel_text.numbers,
        kernel_text.pressure,
        kernel_text.io_stat,
        lambda text: kernel_text.blkio(text, text[::-1]),
        lambda text: list(kernel_text.interfaces(text)),
        lambda text: [kernel_text.value(kernel_text.pairs(text), key, 10_000_000) for key in kernel_text.pairs(text)],
    ],
)
@given(text=ANY)
def test_any_text_is_read_and_gives_numbers_of_64_bits(read: Callable[[bytes], object], text: bytes) -> None:
    assert all(0 <= n < 2**64 for n in _numbers_in(read(text)))
