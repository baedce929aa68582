"""System calls on namespaces, by ctypes: unshare(2), setns(2), mount(2), umount2(2), statfs(2).

Those that change something raise an audit event first, as :mod:`snapshotter.mounts` does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterable

from criserver.errors import FailedPreconditionError, ResourceExhaustedError

_CLONE = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "user": 0x10000000}
KINDS = tuple(_CLONE)
"""The kinds of namespaces that a pod may have, by the names in /proc/PID/ns."""

_MS_BIND = 0x1000
_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8
_NSFS_MAGIC = 0x6E736673

_libc = ctypes.CDLL(None, use_errno=True)


def clone_flags(kinds: Iterable[str]) -> int:
    """The flags of unshare(2) for these kinds."""
    return sum(_CLONE[kind] for kind in kinds)


def unshare(kinds: list[str]) -> None:
    """Move the calling thread into new namespaces. It raises as :func:`unshare_error` says."""
    sys.audit("criserver.unshare", kinds)
    if _libc.unshare(clone_flags(kinds)) != 0:
        raise unshare_error(kinds, ctypes.get_errno())


def unshare_error(kinds: list[str], number: int) -> Exception:
    """The exception for an error number of unshare(2): ResourceExhaustedError, FailedPreconditionError or OSError."""
    reason = f"unshare of {', '.join(kinds)}: {os.strerror(number)}"
    if number == errno.ENOSPC:
        return ResourceExhaustedError(f"{reason}; raise the user.max_*_namespaces sysctls of the node")
    if number == errno.EPERM:
        return FailedPreconditionError(f"{reason}; the daemon needs CAP_SYS_ADMIN")
    return OSError(number, reason)


def enter(fds: Iterable[int]) -> None:
    """Move the calling thread into these namespaces. Raises OSError."""
    for fd in fds:
        sys.audit("criserver.setns", fd)
        if _libc.setns(fd, 0) != 0:
            raise _os_error("setns")


def bind_mount(source: str, path: str) -> None:
    """Mount ``source`` on ``path``. Raises OSError."""
    sys.audit("criserver.mount", path)
    if _libc.mount(source.encode(), os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        raise _os_error(f"bind mount of {source}", path)


def unmount(path: str) -> bool:
    """Unmount the topmost mount on ``path``; False where there is none. Raises OSError."""
    sys.audit("criserver.umount", path)
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        return False
    raise _os_error("umount", path)


def is_pinned(path: str) -> bool:
    """Whether a namespace is mounted on ``path``: a file of nsfs, not the empty file that the mount hides."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs; f_type is its first member
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value == _NSFS_MAGIC


def _os_error(call: str, *path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", *path)
