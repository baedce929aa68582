"""Any bytes as account files: the parser finds only entries that the C library finds, and its errors are bounded."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from typing import Any

from criserver.errors import FailedPreconditionError
from criserver.model import MAX_ID
from criserver.oci import container_user
from criserver.oci.accounts import accounts, group_id

_libc = ctypes.CDLL(None, use_errno=True)


class _Passwd(ctypes.Structure):
    """struct passwd (getpwnam(3))."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("password", ctypes.c_char_p),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("gecos", ctypes.c_char_p),
        ("directory", ctypes.c_char_p),
        ("shell", ctypes.c_char_p),
    )


class _Group(ctypes.Structure):
    """The beginning of struct group (getgrnam(3))."""

    _fields_ = (("name", ctypes.c_char_p), ("password", ctypes.c_char_p), ("gid", ctypes.c_uint32))


_libc.fmemopen.restype = ctypes.c_void_p
_libc.fgetpwent.restype = ctypes.POINTER(_Passwd)
_libc.fgetgrent.restype = ctypes.POINTER(_Group)


def check(data: bytes) -> None:
    """``data`` is a passwd file and a group file at once."""
    found = [(a.name, a.uid, a.gid) for a in accounts(io.BytesIO(data))]
    others = iter([(e.name, e.uid, e.gid) for e in _entries(_libc.fgetpwent, data)])
    assert all(any(entry == other for other in others) for entry in found), (found, data)
    names = {e.name for e in _entries(_libc.fgetgrent, data)}
    for name in {b"a", b"root", *(line.split(b":")[0] for line in data.split(b"\n")[:20])}:
        gid = group_id(io.BytesIO(data), name)
        assert gid is None or gid <= MAX_ID
        # Where the first of several entries is none for us (" 1" is a number in C), the next one counts.
        assert gid is None or name in names
    for user in ("root", "a", 0, 33):
        try:
            got = container_user.resolve(
                user=user, group="a", supplemental=(), strict=False, passwd=io.BytesIO(data), groups=io.BytesIO(data)
            )
        except FailedPreconditionError as e:
            assert len(str(e)) < 1000
        else:
            assert all(0 <= number <= MAX_ID for number in (got.uid, got.gid, *got.groups))
            assert isinstance(user, str) or got.uid == user


def _entries(read: Callable[..., Any], data: bytes) -> list[_Passwd | _Group]:
    """What the C library finds, without the copies that it overwrites."""
    if not data:
        return []
    buffer = ctypes.create_string_buffer(data, len(data))
    file = ctypes.c_void_p(_libc.fmemopen(buffer, ctypes.c_size_t(len(data)), b"r"))
    found = []
    try:
        while entry := read(file):
            copy = type(entry.contents)()
            ctypes.pointer(copy)[0] = entry.contents
            copy.name = bytes(entry.contents.name)
            found.append(copy)
    finally:
        _libc.fclose(file)
    return found
