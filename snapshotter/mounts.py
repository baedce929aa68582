"""System calls that the standard library lacks, and the kernel's list of mounts.

For the snapshotter and for everyone in the daemon who mounts. Each call raises OSError with the kernel's errno
and the path that it was about.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437  # the same on every architecture: it came after the numbers were unified

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)

_OCTAL = re.compile(rb"\\([0-7]{3})")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). A source or target that is relative is resolved in the calling thread's directory."""
    kind = None if fstype is None else os.fsencode(fstype)
    options = None if data is None else os.fsencode(data)
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, options) != 0:
        raise _error(target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        raise _error(target)


def unmount(target: str) -> None:
    """Unmount all that is mounted on ``target``, lazily where it is busy; nothing mounted is no error."""
    try:
        while True:
            try:
                umount2(target, UMOUNT_NOFOLLOW)
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise
                umount2(target, UMOUNT_NOFOLLOW | MNT_DETACH)
    except OSError as e:
        # Neither a mount nor there at all: this is how the loop ends.
        if e.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread."""
    if _libc.unshare(flags) != 0:
        raise _error(None)


def openat2(dir_fd: int, path: bytes | str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): the new descriptor, which is never inherited by other programs."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        raise _error(path)
    return fd


def mounts_below(directory: str) -> list[str]:
    """The mount points strictly below ``directory``, deepest first and the last mounted first of equals."""
    prefix = directory.rstrip("/") + "/"
    with open("/proc/self/mountinfo", "rb") as file:
        points = [os.fsdecode(_unescaped(line.split(b" ", 5)[4])) for line in file]
    return sorted((p for p in reversed(points) if p.startswith(prefix)), key=lambda p: -p.count("/"))


def _unescaped(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)


def _error(path: bytes | str | None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
