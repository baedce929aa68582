"""A pod's namespaces: made without a process that stays, and kept alive by bind mounts.

runtime/ makes them before the network and hands their paths to CNI plugins and to runc. A pinned namespace
lasts until :func:`unpin`, whatever becomes of the daemon; the directory's name is enough to undo it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import itertools
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from criserver.text import quoted
from snapshotter import files, removal
from snapshotter.threads import start_thread

_CLONE = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "user": 0x10000000}
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
_MAX_WORDS = 2000

# A process with threads cannot leave its user namespace, so another one makes it: unshares it, becomes its root once
# its ids are mapped, unshares the namespaces that it is to own and writes their sysctls. For each step it prints the
# error number, 0 for none. It waits for a line after the first step, and at the end until it is killed or alone.
_MAKER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def unshare(flags):
    return ctypes.get_errno() if libc.unshare(flags) else 0
def write(path, value):
    try:
        os.write(os.open("/proc/sys/" + path, os.O_WRONLY), os.fsencode(value))
    except OSError as e:
        return e.errno
    return 0
def tell(number):
    os.write(1, b"%d\\n" % number)
tell(unshare(int(sys.argv[1])))
if os.read(0, 1):
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    tell(unshare(int(sys.argv[2])))
    for path, value in zip(sys.argv[3::2], sys.argv[4::2]):
        tell(write(path, value))
    os.read(0, 1)
"""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class IdMapping:
    """The ``length`` ids from ``container_id`` on in a user namespace are those from ``host_id`` on of the node."""

    container_id: int
    host_id: int
    length: int


@dataclass(frozen=True, slots=True)
class UserMapping:
    """The ids of a user namespace, as user_namespaces(7) has them: ranges that do not overlap, with id 0 in one."""

    uids: tuple[IdMapping, ...]
    gids: tuple[IdMapping, ...]


@dataclass(frozen=True, slots=True)
class PinnedNamespaces:
    """Paths of the files on which the namespaces are mounted; None for one that was not asked for."""

    net: str | None
    ipc: str | None
    uts: str | None
    user: str | None = None


async def make(
    directory: str,
    *,
    net: bool,
    ipc: bool,
    uts: bool,
    hostname: str = "",
    sysctls: Mapping[str, str] | None = None,
    user: UserMapping | None = None,
) -> PinnedNamespaces:
    """Make the namespaces asked for, set them up and pin them in ``directory``, which must not exist yet.

    A new network namespace has its loopback interface up. ``sysctls`` are named with dots or slashes. With ``user``
    a user namespace with those ids is made as well, and it owns the others. Raises InvalidArgumentError for a
    hostname or sysctl without its namespace, and for one or for ids that the kernel refuses;
    FailedPreconditionError where ``directory`` exists; ResourceExhaustedError at the kernel's limit;
    DeadlineExceededError; CriError. When it raises, also when cancelled, nothing is left.
    """
    kinds = [kind for kind, wanted in (("net", net), ("ipc", ipc), ("uts", uts)) if wanted]
    if hostname and not uts:
        raise InvalidArgumentError(
            f"hostname {quoted(hostname)} cannot be set: the pod shares the node's UTS namespace"
        )
    settings = {_sysctl_path(name, kinds): value for name, value in (sysctls or {}).items()}
    made: dict[str, int] = {}
    if user is not None:
        made, settings = await _make_owned(user, kinds, settings)

    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[PinnedNamespaces] = loop.create_future()

    def work() -> None:
        try:
            pinned = _build(directory, kinds, hostname, settings, made)
        except BaseException as e:  # noqa: BLE001 - handed to the waiting coroutine, which raises it
            loop.call_soon_threadsafe(outcome.set_exception, e)
        else:
            loop.call_soon_threadsafe(outcome.set_result, pinned)

    def take_back(late: asyncio.Future[PinnedNamespaces]) -> None:
        if late.exception() is None:
            unpin(directory)

    # A thread of its own, never a pooled one: it cannot leave the namespaces that it enters.
    try:
        start_thread(work, "namespaces")
    except OSError as e:
        for fd in made.values():
            os.close(fd)
        raise ResourceExhaustedError(f"no namespaces can be made in {directory}: {e.strerror}") from e
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


async def stream_socket(path: str | None, family: int) -> socket.socket:
    """A TCP socket of the network namespace that is pinned at ``path``, None for the node's; it does not block.

    Raises OSError where there is no such namespace, or where it lacks the address family.
    """
    if path is None:
        return _stream_socket(family)
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[socket.socket] = loop.create_future()

    def work() -> None:
        try:
            with open(path) as file:
                _enter([file.fileno()])
            made = _stream_socket(family)
        except OSError as e:
            loop.call_soon_threadsafe(settle, e)
        else:
            loop.call_soon_threadsafe(settle, made)

    def settle(found: socket.socket | OSError) -> None:
        if isinstance(found, OSError):
            if not outcome.done():
                outcome.set_exception(found)
        elif outcome.done():
            found.close()
        else:
            outcome.set_result(found)

    # A thread of its own, as above.
    start_thread(work, "dial")
    return await outcome


def _stream_socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def unpin(directory: str) -> None:
    """Unmount and remove what :func:`make` left in ``directory``, whole or in part, and the directory.

    Succeeds when it is gone already. Raises CriError where a mount or file cannot be removed.
    """
    try:
        for kind in _CLONE:
            path = os.path.join(directory, kind)
            while _unmount(path):
                pass
        removal.remove_path(directory)
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
        raise InvalidArgumentError(f"sysctl {quoted(name)} is not the name of a sysctl")
    if not any(path.startswith(_SYSCTLS[kind]) for kind in kinds):
        raise InvalidArgumentError(
            f"sysctl {quoted(name)} is not of a namespace that the pod has for itself "
            f"({', '.join(kinds) or 'it has none'}); it can only be set on the node"
        )
    return path


async def _make_owned(
    user: UserMapping, kinds: list[str], settings: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Make a user namespace, and ``kinds`` owned by it.

    Returns their descriptors by kind, and those of the sysctls ``settings`` that are still to be written, by the node's
    root: the kernel lets one of the two roots write each, and newer kernels let the pod's write more of them.
    """
    for name, ids in (("user", user.uids), ("group", user.gids)):
        if not any(r.container_id == 0 and r.length > 0 for r in ids):
            raise InvalidArgumentError(f"the pod's user namespace needs a mapping of {name} ID 0")
    for path, value in settings.items():
        if "\0" in value:
            raise InvalidArgumentError(f"sysctl {path} = {quoted(value)} has a zero byte")
    opened: dict[str, int] = {}
    try:
        async with asyncio.timeout(_DEADLINE), _maker(kinds, settings) as maker:
            assert maker.stdin is not None
            await _unshared(maker, ["user"])
            _write_map(maker.pid, "uid_map", user.uids)
            _write_map(maker.pid, "gid_map", user.gids)
            maker.stdin.write(b"\n")
            await _unshared(maker, kinds)
            left = {path: value for path, value in settings.items() if not await _written(maker, path, value)}
            for kind in ("user", *kinds):
                opened[kind] = os.open(f"/proc/{maker.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException as e:
        for fd in opened.values():
            os.close(fd)
        if isinstance(e, TimeoutError):
            raise DeadlineExceededError(f"the kernel did not make a user namespace within {_DEADLINE:g} s") from e
        if isinstance(e, OSError):
            raise CriError(f"cannot make a user namespace: {e}") from e
        raise
    return opened, left


@asynccontextmanager
async def _maker(kinds: list[str], settings: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", _MAKER, str(_flags(["user"])), str(_flags(kinds))),
        *itertools.chain.from_iterable(settings.items()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # Longer only if the kernel itself does not let go of it; asyncio reaps it then, once it ends.
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await process.wait()


async def _unshared(maker: asyncio.subprocess.Process, kinds: list[str]) -> None:
    if number := await _told(maker):
        raise _unshare_error(kinds, number)


async def _written(maker: asyncio.subprocess.Process, path: str, value: str) -> bool:
    """Whether the maker wrote a sysctl; it did not where it may not."""
    number = await _told(maker)
    if number and number not in (errno.EACCES, errno.EPERM):
        raise _sysctl_error(path, value, number)
    return number == 0


async def _told(maker: asyncio.subprocess.Process) -> int:
    """The error number of the maker's next step."""
    assert maker.stdout is not None
    assert maker.stderr is not None
    told = await maker.stdout.readline()
    if not told:
        words = (await maker.stderr.read(_MAX_WORDS)).decode(errors="replace").strip()
        raise CriError(f"the process that makes a user namespace ended early: {words or 'without a word'}")
    return int(told)


def _write_map(pid: int, name: str, ids: tuple[IdMapping, ...]) -> None:
    text = "".join(f"{r.container_id} {r.host_id} {r.length}\n" for r in ids)
    try:
        _write(f"/proc/{pid}/{name}", text)
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise InvalidArgumentError(f"{name} {text.splitlines()} of the pod is refused by the kernel") from e
        raise


def _build(
    directory: str, kinds: list[str], hostname: str, settings: Mapping[str, str], made: Mapping[str, int]
) -> PinnedNamespaces:
    """The thread's work: from the first call on it is in the pod's namespaces and sees /proc/sys as the pod.

    Enters the namespaces ``made``, and closes them, or makes them where there are none.
    """
    try:
        files.make_private(os.path.dirname(directory))
        os.mkdir(directory, 0o700)
        try:
            if made:
                _enter(made[kind] for kind in kinds)
            else:
                _unshare(kinds)
            if hostname:
                socket.sethostname(hostname)
            for path, value in settings.items():
                _write_sysctl(path, value)
            if "net" in kinds:
                _raise_loopback()
            # Not /proc/self/ns: that is the main thread's.
            paths = {kind: _pin(kind, directory, f"/proc/thread-self/ns/{kind}") for kind in kinds}
            if made:
                paths["user"] = _pin("user", directory, f"/proc/thread-self/fd/{made['user']}")
        except BaseException:
            unpin(directory)
            raise
    except FileExistsError as e:
        raise FailedPreconditionError(f"{directory} exists; namespaces of an earlier pod must be unpinned") from e
    except OSError as e:
        raise CriError(f"cannot make the namespaces in {directory}: {e}") from e
    finally:
        for fd in made.values():
            os.close(fd)
    return PinnedNamespaces(paths.get("net"), paths.get("ipc"), paths.get("uts"), paths.get("user"))


def _unshare(kinds: list[str]) -> None:
    if _libc.unshare(_flags(kinds)) != 0:
        raise _unshare_error(kinds, ctypes.get_errno())


def _flags(kinds: list[str]) -> int:
    return sum(_CLONE[kind] for kind in kinds)


def _unshare_error(kinds: list[str], number: int) -> Exception:
    reason = f"unshare of {', '.join(kinds)}: {os.strerror(number)}"
    if number == errno.ENOSPC:
        return ResourceExhaustedError(f"{reason}; raise the user.max_*_namespaces sysctls of the node")
    if number == errno.EPERM:
        return FailedPreconditionError(f"{reason}; the daemon needs CAP_SYS_ADMIN")
    return OSError(number, reason)


def _enter(fds: Iterable[int]) -> None:
    for fd in fds:
        if _libc.setns(fd, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")


def _write_sysctl(path: str, value: str) -> None:
    try:
        _write(f"/proc/sys/{path}", value)
    except OSError as e:
        raise _sysctl_error(path, value, e.errno or 0) from e


def _sysctl_error(path: str, value: str, number: int) -> InvalidArgumentError:
    return InvalidArgumentError(f"sysctl {path} = {quoted(value)} is refused by the kernel: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    """Write in one call, as the files of /proc want it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _raise_loopback() -> None:
    """``ip link set lo up``; the kernel adds 127.0.0.1 and ::1 by itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _pin(kind: str, directory: str, source: str) -> str:
    path = os.path.join(directory, kind)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o400))
    if _libc.mount(source.encode(), os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bind mount of {source}: {os.strerror(number)}", path)
    return path


def _unmount(path: str) -> bool:
    """Take the topmost mount off ``path``; False when there is none."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        return False
    raise OSError(number, os.strerror(number), path)
