"""System calls for mounts that the standard library lacks, and the kernel's list of mounts.

Each call raises OSError with the kernel's errno and the path. It first raises an audit event (PEP 578), as the calls of
the standard library do: tests/support/faulty.py stops the daemon there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 0x1
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

_MOVE_MOUNT_F_EMPTY_PATH = 0x4

# These numbers are the same on every architecture.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_LOOKUPS = 100  # of a path, before the error is taken for one that lasts
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
_libc.syncfs.argtypes = (ctypes.c_int,)

_OCTAL = re.compile(rb"\\([0-7]{3})")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


# A separate function with declared argument types, so that calls need no wrapping: walks call it for each directory.
_openat2 = _libc["syscall"]
_openat2.restype = ctypes.c_long
_openat2.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). A source or target that is relative is resolved in the calling thread's directory."""
    kind = None if fstype is None else os.fsencode(fstype)
    options = None if data is None else os.fsencode(data)
    sys.audit("criserver.mount", target)
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, options) != 0:
        raise _error(target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    sys.audit("criserver.umount", target)
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
        # The loop ends here, when there is no mount any more, or no such path.
        if e.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
            raise


def syncfs(path: str) -> None:
    """syncfs(2) of the file system at ``path``. It reports failed writes too that no caller has been told of."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            raise _error(path)
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread."""
    sys.audit("criserver.unshare", flags)
    if _libc.unshare(flags) != 0:
        raise _error(None)


def openat2(dir_fd: int, path: bytes | str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): the new descriptor, which is never inherited by other programs."""
    sys.audit("open", path, None, flags)
    how = _how(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_LOOKUPS):
        fd: int = _openat2(_SYS_OPENAT2, dir_fd, os.fsencode(path), how, ctypes.sizeof(how))
        if fd >= 0:
            return fd
        # With "..", a rename or mount anywhere on the node makes the kernel give up (openat2(2), EAGAIN).
        if ctypes.get_errno() != errno.EAGAIN:
            break
    raise _error(path)


@cache
def _how(flags: int, mode: int, resolve: int) -> _OpenHow:
    """Cached, as a walk opens all directories with the same arguments."""
    return _OpenHow(flags, mode, resolve)


def open_tree(dir_fd: int, path: str, flags: int) -> int:
    """open_tree(2): the descriptor of a mount, with OPEN_TREE_CLONE of a new one that is attached nowhere yet."""
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(flags | os.O_CLOEXEC),
    )
    if fd < 0:
        raise _error(path)
    return fd


def mount_setattr(
    dir_fd: int, path: str, flags: int, attributes: int, *, userns: int = 0, propagation: int = 0
) -> None:
    """mount_setattr(2), which sets ``attributes``; MOUNT_ATTR_IDMAP is about the descriptor ``userns``."""
    sys.audit("criserver.mount_setattr", path)
    wanted = _MountAttr(attributes, 0, propagation, userns)
    failed: int = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(flags),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    if failed:
        raise _error(path)


def move_mount(tree: int, target: str) -> None:
    """move_mount(2): attach the mount ``tree`` at ``target``."""
    sys.audit("criserver.move_mount", target)
    failed: int = _libc.syscall(
        ctypes.c_long(_SYS_MOVE_MOUNT),
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )
    if failed:
        raise _error(target)


def bind_idmapped(source: str, target: str, userns: str, attributes: int = 0) -> None:
    """Bind ``source`` to ``target``, as a private mount with its files' owners mapped into a user namespace.

    An ID on disk counts as an ID in that namespace, whose file is ``userns``. Mounts below ``source`` are left out. The
    kernel's error is EINVAL if the file system does not support such mounts, and ENOSYS before Linux 5.12.
    """
    namespace = os.open(userns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        clone = open_tree(AT_FDCWD, source, OPEN_TREE_CLONE)
        try:
            wanted = attributes | MOUNT_ATTR_IDMAP
            mount_setattr(clone, "", AT_EMPTY_PATH, wanted, userns=namespace, propagation=MS_PRIVATE)
            move_mount(clone, target)
        finally:
            os.close(clone)
    finally:
        os.close(namespace)


def mounts_below(directory: str) -> list[str]:
    """The mount points strictly below ``directory``, deepest first and the last mounted first of equals.

    They are real paths, as the kernel lists them. ``directory`` may be reached through symbolic links.
    """
    prefix = os.path.join(os.path.realpath(directory), "")
    with open("/proc/self/mountinfo", "rb") as file:
        points = [os.fsdecode(_unescaped(line.split(b" ", 5)[4])) for line in file]
    return sorted((p for p in reversed(points) if p.startswith(prefix)), key=lambda p: -p.count("/"))


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of the kernel's list of mounts (proc_pid_mountinfo(5))."""

    number: int
    point: str
    options: tuple[str, ...]
    tags: tuple[str, ...]  # as "shared:1"
    kind: str
    file_system_options: tuple[str, ...]


def entries(path: str = "/proc/self/mountinfo") -> Iterator[MountEntry]:
    """The mounts in the order in which they were made. Raises OSError where the list cannot be read.

    The list is read as bytes, and a space alone ends a field: a path may be in any encoding, it may have other white
    space, and the source of a mount may be empty.
    """
    with open(path, "rb") as file:
        for line in file:
            fields = line.rstrip(b"\n").split(b" ")
            end = fields.index(b"-", 6)
            texts = [os.fsdecode(field) for field in fields]
            yield MountEntry(
                number=int(fields[0]),
                point=os.fsdecode(_unescaped(fields[4])),
                options=tuple(texts[5].split(",")),
                tags=tuple(texts[6:end]),
                kind=texts[end + 1],
                file_system_options=tuple(texts[end + 3].split(",")),
            )


def mount_of(path: str) -> tuple[str, tuple[str, ...]]:
    """The mount point of the mount that ``path`` is in, and its tags. Raises OSError where there is no such path."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            wanted = next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
    finally:
        os.close(fd)
    return next(((entry.point, entry.tags) for entry in entries() if entry.number == wanted), (path, ()))


def _unescaped(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)


def _error(path: bytes | str | None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
