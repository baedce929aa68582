"""Account files: our parser and the C library find the same in the same bytes."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import FailedPreconditionError
from criserver.model import MAX_GROUPS
from criserver.oci.accounts import Account, accounts, claimed, group_id, memberships
from tests.fuzz.accounts import check

WORDS = (b"a", b"root", b"0", b"33", b":", b"\n", b" ", b"#", b"+", b"-", b"\0", b"\r", b"\xff")


def found(passwd: bytes) -> list[Account]:
    return list(accounts(io.BytesIO(passwd)))


@given(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(WORDS)).map(b"".join)))
def test_no_entry_that_the_c_library_does_not_find(data: bytes) -> None:
    check(data)


@pytest.mark.parametrize(
    "line",
    [
        b"a:x:4294967295:0::/:",
        b"a:x:0:4294967296::/:",
        b"a:x:" + b"9" * 5000 + b":0::/:",
        b"a:x::0::/:",
        b"a:x:-1:0::/:",
        b"a:x:0x10:0::/:",
        "a:x:１:0::/:".encode(),
        b"a:x:5",
        b"#a:x:5:5::/:",
        b"+a:x:5:5::/:",
        b"-a:x:5:5::/:",
        b":x:5:5::/:",
        b"a:x:5:5\r",
        b"a:x:5:5\0:",
        b"a:x:5:5:" + b"g" * 70_000,
    ],
)
def test_what_is_no_entry(line: bytes) -> None:
    assert found(line + b"\nweb:x:33:44::/:\n") == [Account(b"web", 33, 44)]


def test_lines_end_at_a_newline_and_nowhere_else() -> None:
    """str.splitlines() takes ten more characters for the end of a line, and would find root here."""
    ends = ("\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
    passwd = "".join(f"web:x:33:44:{end}evil:x:0:0::/:\n" for end in ends).encode()
    assert found(passwd) == [Account(b"web", 33, 44)] * len(ends)


def test_names_are_bytes_and_blanks_before_an_entry_are_none_of_it() -> None:
    assert found(b"\t \xffweb:x:33:44") == [Account(b"\xffweb", 33, 44)]


def test_groups() -> None:
    file = io.BytesIO(b"broken\nbig:x:4294967296:web\na:x:7:web, other\nb:x:8:webb,we\nc:x:9\na:x:10:other\n")
    assert group_id(file, b"a") == 7
    file.seek(0)
    assert group_id(file, b"big") is None
    for user, expected in ((b"web", {7}), (b"other", {7, 10}), (b"we", {8})):
        file.seek(0)
        assert memberships(file, user) == expected


def test_numbers_that_a_group_of_another_id_is_named() -> None:
    file = b"7:x:7:\n8:x:0:\n\xc2\x859\t:x:junk:\n#10\n11:\x00x:11\n012:x:0:\n13:x:0:" + b"a," * 50_000
    assert claimed(io.BytesIO(file), set(range(15))) == {8, 9, 13}
    assert claimed(io.BytesIO(b"14"), {14}) == {14}


def test_groups_that_would_take_the_oci_runtime_long_to_look_up() -> None:
    with pytest.raises(FailedPreconditionError, match="8000 lines and the container 7000 groups"):
        claimed(io.BytesIO(b"a:x:1:\n" * 8000), set(range(7000)))


def test_more_groups_than_the_kernel_takes_are_refused() -> None:
    lines = [b"g%d:x:%d:web\n" % (n, n) for n in range(MAX_GROUPS + 1)]
    assert len(memberships(io.BytesIO(b"".join(lines[:-1])), b"web")) == MAX_GROUPS
    with pytest.raises(FailedPreconditionError, match=str(MAX_GROUPS)):
        memberships(io.BytesIO(b"".join(lines)), b"web")
