"""Whether a file system has the types of files in the lists of its directories (readdir(3), d_type).

Overlayfs finds whiteouts by these types. Without them it shows the names of files that an image deletes.
"""

from __future__ import annotations

import ctypes
import os

_UNKNOWN = 0  # DT_UNKNOWN

_libc = ctypes.CDLL(None, use_errno=True)


class _ListedFile(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = (ctypes.c_char_p,)
_libc.readdir.restype = ctypes.POINTER(_ListedFile)
_libc.readdir.argtypes = (ctypes.c_void_p,)
_libc.closedir.argtypes = (ctypes.c_void_p,)


def are_known(directory: str) -> bool:
    """Whether the list of this directory has the type of each entry; true for an empty one. Raises OSError.

    The standard library does not tell: os.scandir() asks for each file of an unknown type itself.
    """
    stream = _libc.opendir(os.fsencode(directory))
    if not stream:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), directory)
    try:
        while entry := _libc.readdir(stream):
            # Some file systems have the types of these two alone.
            if entry.contents.d_name not in (b".", b"..") and entry.contents.d_type == _UNKNOWN:
                return False
        return True
    finally:
        _libc.closedir(stream)
