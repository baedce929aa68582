"""A pod's namespaces: made without a process, and kept alive by bind mounts.

runtime/ makes them before the network and hands their paths to CNI plugins and to runc. A pinned namespace
lasts until :func:`unpin`, whatever becomes of the daemon; the directory's name is enough to undo it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)

_CLONE = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}
# Sysctls that belong to a namespace (kernel Documentation/admin-guide/sysctl); every other one is the node's.
_SYSCTLS = {
    "net": ("net/",),
    "ipc": ("kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"),
    "uts": ("kernel/domainname",),
}
_MS_BIND = 0x1000
_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8
_NSFS_MAGIC = 0x6E736673
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1

# Seconds. The work takes milliseconds; more than that is a kernel that is stuck on its namespace locks.
_DEADLINE = 10.0
_GRACE = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class PinnedNamespaces:
    """Paths of the files on which the namespaces are mounted; None for one that was not asked for."""

    net: str | None
    ipc: str | None
    uts: str | None


async def make(
    directory: str,
    *,
    net: bool,
    ipc: bool,
    uts: bool,
    hostname: str = "",
    sysctls: Mapping[str, str] | None = None,
) -> PinnedNamespaces:
    """Make the namespaces asked for, set them up and pin them in ``directory``, which must not exist yet.

    A new network namespace has its loopback interface up. ``sysctls`` are named with dots or slashes. Raises
    InvalidArgumentError for a hostname or sysctl without its namespace, or that the kernel refuses;
    FailedPreconditionError where ``directory`` exists; ResourceExhaustedError at the kernel's limit;
    DeadlineExceededError; CriError. When it raises, also when cancelled, nothing is left.
    """
    kinds = [kind for kind, wanted in (("net", net), ("ipc", ipc), ("uts", uts)) if wanted]
    if hostname and not uts:
        raise InvalidArgumentError(f"hostname {hostname!r} cannot be set: the pod shares the node's UTS namespace")
    settings = {_sysctl_path(name, kinds): value for name, value in (sysctls or {}).items()}

    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[PinnedNamespaces] = loop.create_future()

    def work() -> None:
        try:
            pinned = _build(directory, kinds, hostname, settings)
        except BaseException as e:  # noqa: BLE001 - handed to the waiting coroutine, which raises it
            loop.call_soon_threadsafe(outcome.set_exception, e)
        else:
            loop.call_soon_threadsafe(outcome.set_result, pinned)

    def take_back(late: asyncio.Future[PinnedNamespaces]) -> None:
        if late.exception() is None:
            unpin(directory)

    # A thread of its own, never a pooled one: it cannot leave the namespaces that it enters.
    threading.Thread(target=work, name="namespaces", daemon=True).start()
    try:
        done, _ = await asyncio.wait({outcome}, timeout=_DEADLINE)
    except asyncio.CancelledError:
        outcome.add_done_callback(take_back)
        await asyncio.wait({outcome}, timeout=_GRACE)
        raise
    if not done:
        outcome.add_done_callback(take_back)
        raise DeadlineExceededError(f"the kernel did not make the namespaces in {directory} within {_DEADLINE:g} s")
    return outcome.result()


def unpin(directory: str) -> None:
    """Unmount and remove what :func:`make` left in ``directory``, whole or in part, and the directory.

    Succeeds when it is gone already. Raises CriError where a mount or file cannot be removed.
    """
    try:
        for kind in _CLONE:
            path = os.path.join(directory, kind)
            while _unmount(path):
                pass
            _ignore_missing(os.unlink, path)
        _ignore_missing(os.rmdir, directory)
    except OSError as e:
        raise CriError(f"cannot remove the pinned namespaces in {directory}: {e}") from e


def is_pinned(path: str) -> bool:
    """Whether ``path`` is a namespace: a file of nsfs, not the empty file that a mount leaves behind."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs; f_type is its first member
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value == _NSFS_MAGIC


def _sysctl_path(name: str, kinds: list[str]) -> str:
    """The path below /proc/sys of a sysctl that is one of ``kinds``' own; sysctl(8) has the spelling's rule."""
    dot, slash = name.find("."), name.find("/")
    swap = dot != -1 and (slash == -1 or dot < slash)
    path = name.translate(str.maketrans("./", "/.")) if swap else name
    if {"", ".", ".."} & set(path.split("/")) or "\0" in path:
        raise InvalidArgumentError(f"sysctl {name!r} is not the name of a sysctl")
    if not any(path.startswith(_SYSCTLS[kind]) for kind in kinds):
        raise InvalidArgumentError(
            f"sysctl {name!r} is not of a namespace that the pod has for itself "
            f"({', '.join(kinds) or 'it has none'}); it can only be set on the node"
        )
    return path


def _build(directory: str, kinds: list[str], hostname: str, settings: Mapping[str, str]) -> PinnedNamespaces:
    """The thread's work: from the first call on it is in the pod's namespaces and sees /proc/sys as the pod."""
    try:
        os.makedirs(directory, mode=0o700)
    except FileExistsError as e:
        raise FailedPreconditionError(f"{directory} exists; namespaces of an earlier pod must be unpinned") from e
    try:
        _unshare(kinds)
        if hostname:
            socket.sethostname(hostname)
        for path, value in settings.items():
            _write_sysctl(path, value)
        if "net" in kinds:
            _raise_loopback()
        paths = {kind: _pin(kind, directory) for kind in kinds}
    except BaseException as e:
        unpin(directory)
        if isinstance(e, OSError):
            raise CriError(f"cannot make the namespaces in {directory}: {e}") from e
        raise
    return PinnedNamespaces(paths.get("net"), paths.get("ipc"), paths.get("uts"))


def _unshare(kinds: list[str]) -> None:
    if _libc.unshare(sum(_CLONE[kind] for kind in kinds)) == 0:
        return
    number = ctypes.get_errno()
    reason = f"unshare of {', '.join(kinds)}: {os.strerror(number)}"
    if number == errno.ENOSPC:
        raise ResourceExhaustedError(f"{reason}; raise the user.max_*_namespaces sysctls of the node")
    if number == errno.EPERM:
        raise FailedPreconditionError(f"{reason}; the daemon needs CAP_SYS_ADMIN")
    raise OSError(number, reason)


def _write_sysctl(path: str, value: str) -> None:
    try:
        fd = os.open(f"/proc/sys/{path}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as e:
        raise InvalidArgumentError(f"sysctl {path} = {value!r} is refused by the kernel: {e.strerror}") from e


def _raise_loopback() -> None:
    """``ip link set lo up``; the kernel adds 127.0.0.1 and ::1 by itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _pin(kind: str, directory: str) -> str:
    path = os.path.join(directory, kind)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o400))
    # Not /proc/self/ns: that is the main thread's.
    source = f"/proc/thread-self/ns/{kind}"
    if _libc.mount(source.encode(), os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bind mount of {source}: {os.strerror(number)}", path)
    return path


def _unmount(path: str) -> bool:
    """Take the topmost mount off ``path``; False when there is none."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), path)


def _ignore_missing(remove: Callable[[str], None], path: str) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        pass
