"""A pod's namespaces: made by a thread, without a process that stays, and pinned by bind mounts.

runtime/ makes them before the network, and passes their paths to CNI plugins and to runc. A pinned namespace lasts
until :func:`unpin`, whether the daemon lives or not. To undo it, the directory's name is enough: a network namespace
that is pinned elsewhere has a link there.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from criserver.network.namespace_calls import KINDS, bind_mount, enter, is_pinned, unmount, unshare
from criserver.network.sysctls import Sysctl, requested
from criserver.network.user_namespace import UserMapping, make_user_namespace, write_as_pods_root
from criserver.text import quoted
from snapshotter import files, removal
from snapshotter.threads import start_thread

__all__ = ["PinnedNamespaces", "UserMapping", "is_pinned", "make", "pin_behind", "set_sysctls", "unpin"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1

# Seconds. The work takes milliseconds. If it takes longer, the kernel is stuck on its namespace locks.
_DEADLINE = 10.0
_GRACE = 1.0


@dataclass(frozen=True, slots=True)
class PinnedNamespaces:
    """Paths of the files on which the namespaces are mounted; None for one that was not requested."""

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
    net_pin: str = "",
    hostname: str = "",
    sysctls: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    user: UserMapping | None = None,
) -> PinnedNamespaces:
    """Make the requested namespaces, set them up and pin them in ``directory``, which must not exist yet.

    The network namespace is pinned at the path ``net_pin``, if one is given, and ``directory`` has a link to it. The
    directory of that path is made if it is missing.

    The loopback interface of a new network namespace is up. ``sysctls`` are named with dots or slashes. One of an
    interface that does not exist is left to :func:`set_sysctls`. ``defaults`` are sysctls by their paths; they are set
    where ``sysctls`` do not name them and the kernel takes them. With ``user`` a user namespace with those IDs is made
    as well, and it owns the others.

    When it raises, also when it is cancelled, nothing is left. It raises:

    1. InvalidArgumentError for a hostname or a sysctl without its namespace, and for a hostname, a sysctl or IDs that
       the kernel refuses.
    2. FailedPreconditionError where ``directory`` exists.
    3. ResourceExhaustedError at a limit of the kernel.
    4. DeadlineExceededError and CriError.
    """
    kinds = [kind for kind, wanted in (("net", net), ("ipc", ipc), ("uts", uts)) if wanted]
    if hostname and not uts:
        raise InvalidArgumentError(
            f"hostname {quoted(hostname)} cannot be set: the pod shares the node's UTS namespace"
        )
    settings = requested(sysctls or {}, kinds if user is None else [*kinds, "user"])
    named = {sysctl.path for sysctl in settings}
    settings += [Sysctl(path, value, optional=True) for path, value in (defaults or {}).items() if path not in named]
    made: dict[str, int] = {}
    if user is not None:
        made, settings = await make_user_namespace(user, kinds, settings)

    def work() -> PinnedNamespaces:
        return _build(directory, kinds, net_pin, hostname, settings, made)

    def undo(late: asyncio.Future[PinnedNamespaces]) -> None:
        if late.exception() is None:
            unpin(directory)

    try:
        outcome = _in_thread(work, f"no namespaces can be made in {directory}")
    except ResourceExhaustedError:
        for fd in made.values():
            os.close(fd)
        raise
    return await _in_time(outcome, undo, f"make the namespaces in {directory}")


async def set_sysctls(pinned: PinnedNamespaces, sysctls: Mapping[str, str]) -> None:
    """Set the network sysctls of ``sysctls``, those of :func:`make`, after the CNI plugins have made the interfaces.

    A plugin may have changed one that was set before. Raises InvalidArgumentError for one that the kernel refuses,
    ResourceExhaustedError, DeadlineExceededError and CriError.
    """
    settings = [sysctl for sysctl in requested(sysctls, KINDS) if sysctl.path.startswith("net/")]
    net = pinned.net
    if net is None or not settings:
        return
    if pinned.user is not None:
        settings = await write_as_pods_root(pinned.user, net, settings)

    def work() -> None:
        fd = os.open(net, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter([fd])
        finally:
            os.close(fd)
        for sysctl in settings:
            sysctl.write(final=True)

    try:
        outcome = _in_thread(work, f"no sysctls can be set in {net}")
        await _in_time(outcome, asyncio.Future.exception, f"set the sysctls of the network namespace {net}")
    except OSError as e:
        raise CriError(f"the sysctls of the network namespace {net} cannot be set: {e}") from e


def _in_thread(work: Callable[[], T], refusal: str) -> asyncio.Future[T]:
    """The outcome of ``work`` in a thread of its own, which cannot leave the namespaces that it enters.

    Raises ResourceExhaustedError, with ``refusal``, where no thread can be started.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as e:  # noqa: BLE001 - passed to the waiting coroutine, which raises it
            loop.call_soon_threadsafe(outcome.set_exception, e)
        else:
            loop.call_soon_threadsafe(outcome.set_result, result)

    try:
        start_thread(run, "namespaces")
    except OSError as e:
        raise ResourceExhaustedError(f"{refusal}: {e.strerror}") from e
    return outcome


async def _in_time(outcome: asyncio.Future[T], late: Callable[[asyncio.Future[T]], object], what: str) -> T:
    """Wait for the outcome. One that nobody waits for any more is given to ``late``."""
    try:
        done, _ = await asyncio.wait({outcome}, timeout=_DEADLINE)
    except asyncio.CancelledError:
        outcome.add_done_callback(late)
        await asyncio.wait({outcome}, timeout=_GRACE)
        raise
    if not done:
        outcome.add_done_callback(late)
        raise DeadlineExceededError(f"the kernel did not {what} within {_DEADLINE:g} s")
    return outcome.result()


def pin_behind(path: str) -> str:
    """The path at which a namespace is pinned: where a link at ``path`` leads, or ``path`` itself. Raises OSError."""
    try:
        return os.readlink(path)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
            raise
        return path


def unpin(directory: str) -> None:
    """Unmount and remove the namespaces of :func:`make` in ``directory``, whole or in part, and the directory.

    Succeeds where it is gone already. Raises CriError where a mount or file cannot be removed.
    """
    try:
        for kind in KINDS:
            path = os.path.join(directory, kind)
            pin = pin_behind(path)
            while unmount(pin):
                pass
            if pin != path:
                _remove_pin(pin)
        removal.remove_path(directory)
    except OSError as e:
        raise CriError(f"cannot remove the pinned namespaces in {directory}: {e}") from e


def _remove_pin(pin: str) -> None:
    """Remove the file of a pin outside of our directories. Raises OSError."""
    # On a read-only file system the kernel refuses to delete what is not there too.
    if not os.path.lexists(pin):
        return
    try:
        removal.remove_path(pin)
    except OSError as e:
        if e.errno != errno.EBUSY:
            raise
        # Somebody has mounted the directory on itself, as `ip netns add` does where it is not shared. The pod is to be
        # removed all the same.
        log.warning("a network namespace stays, as a mount hides where it is pinned", path=pin)


def _build(
    directory: str, kinds: list[str], net_pin: str, hostname: str, settings: list[Sysctl], made: Mapping[str, int]
) -> PinnedNamespaces:
    """The work of the thread. Once it is in the pod's namespaces, it sees /proc/sys as the pod does.

    It enters the namespaces ``made`` and closes their descriptors. Where there are none, it makes the namespaces.
    """
    try:
        files.make_private(os.path.dirname(directory))
        os.mkdir(directory, 0o700)
        try:
            if made:
                enter(made[kind] for kind in kinds)
            else:
                unshare(kinds)
            if hostname:
                socket.sethostname(hostname)
            for sysctl in settings:
                sysctl.write(final=False)
            if "net" in kinds:
                _raise_loopback()
            pins = {kind: os.path.join(directory, kind) for kind in (*kinds, *(["user"] if made else []))}
            if net_pin and "net" in kinds:
                _make_directory(os.path.dirname(net_pin))
                os.symlink(net_pin, pins["net"])  # before the pin, which is found by it
                pins["net"] = net_pin
            for kind, path in pins.items():
                # Not /proc/self/ns: that is the main thread's.
                name = f"fd/{made['user']}" if kind == "user" else f"ns/{kind}"
                _pin(path, f"/proc/thread-self/{name}")
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
    return PinnedNamespaces(pins.get("net"), pins.get("ipc"), pins.get("uts"), pins.get("user"))


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except FileExistsError as e:
        raise FailedPreconditionError(f"{path} is no directory: network namespaces are to be pinned there") from e


def _raise_loopback() -> None:
    """``ip link set lo up``; the kernel adds 127.0.0.1 and ::1 by itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _pin(path: str, source: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o400))
    bind_mount(source, path)
