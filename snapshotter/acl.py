"""Access control lists (acl(5)) that let single users pass a directory.

The kernel has a list in an extended attribute, in little-endian (linux/posix_acl_xattr.h): a version, then entries of a
tag, permissions and an ID.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_OWNER, _USER, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x10, 0x20
_NOBODY = 2**32 - 1  # the ID of entries that need none
_PASS = 1


def users(path: str) -> set[int]:
    """The users that an access control list lets pass the directory. Raises OSError."""
    try:
        value = os.getxattr(path, _ATTRIBUTE)
    except OSError as e:
        if e.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return set()
        raise
    return {number for tag, _, number in _ENTRY.iter_unpack(value[len(_VERSION) :]) if tag == _USER}


def let_pass(path: str, wanted: set[int]) -> None:
    """Let these users pass the directory, and nobody else but its owner.

    Raises OSError, with EOPNOTSUPP on a file system without access control lists.
    """
    mode = stat.S_IMODE(os.stat(path).st_mode) & 0o700
    if not wanted:
        if users(path):
            os.removexattr(path, _ATTRIBUTE)
        os.chmod(path, mode)
        return
    entries = [(_OWNER, mode >> 6, _NOBODY)]
    entries += [(_USER, _PASS, number) for number in sorted(wanted)]
    entries += [(_GROUP, 0, _NOBODY), (_MASK, _PASS, _NOBODY), (_OTHERS, 0, _NOBODY)]
    os.setxattr(path, _ATTRIBUTE, _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries))
