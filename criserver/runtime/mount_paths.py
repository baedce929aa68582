"""The real paths of mounts and devices: in the image through the image's links, on the node through the node's."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, TypeVar, cast

from criserver.errors import DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.model import Device, Mount, Propagation
from criserver.oci.spec_inputs import DeviceNode
from criserver.runtime import host
from snapshotter import mounts
from snapshotter.files import link_target
from snapshotter.tasks import LastingTasks
from snapshotter.threads import in_loose_thread

T = TypeVar("T")

# Seconds that looking up a host path may take.
HOST_PATH_TIMEOUT = 20.0
# The OCI runtime mounts the kernel's file systems here. An image's volume in one of them would hide it.
KERNEL_DIRECTORIES = ("dev", "proc", "sys")
_MAX_LINKS = 40  # as many as the kernel follows (path_resolution(7))
# Parts of paths that are looked up for one container, those of links too. A container has hundreds.
_MAX_PARTS = 100_000
_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors of what is no directory that could be entered.
_NO_DIRECTORY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES})
_lookups: LastingTasks[Any] = LastingTasks(HOST_PATH_TIMEOUT)


async def on_host(mount: Mount) -> Mount:
    """The mount with the node's links resolved. A missing directory is made, as hostPath volumes expect.

    Raises InvalidArgumentError for a path that cannot be made, FailedPreconditionError for one that cannot propagate
    mounts as requested, DeadlineExceededError for a file system that does not answer.
    """
    what = f"mount {mount.container_path}: host path {mount.host_path}"
    return await _in_time(partial(_resolved, mount), mount, what)


async def device_nodes(devices: Iterable[Device]) -> dict[Device, DeviceNode]:
    """The node of each device. A device that is a directory is replaced by one for each node in it.

    Raises InvalidArgumentError as :func:`criserver.runtime.host.device_nodes` does, and DeadlineExceededError.
    """
    nodes = {}
    for device in devices:
        look = partial(host.device_nodes, device.host_path, device.container_path)
        found = await _in_time(look, device, f"device {device.host_path}")
        nodes.update({Device(node.path, path, device.permissions): node for path, node in found.items()})
    return nodes


def in_image(rootfs: str, paths: Iterable[str]) -> dict[str, str]:
    """The real path of each container path, through the image's links, as the OCI runtime resolves them. Blocks.

    A mount hides the image's files below it, so no link there is followed. Mounts of parent directories are made first.
    Raises FailedPreconditionError for links that lead in a circle, and for too many long paths.
    """
    root = os.open(rootfs, _PATH)
    try:
        resolver, resolved = _Resolver(root), dict[str, str]()
        for path in sorted(paths, key=lambda path: path.rstrip("/").count("/")):
            resolved[path] = resolver.resolve(path)
        return resolved
    finally:
        os.close(root)


class _Covered:
    """A tree of the names in paths; ``whole`` tells that a mount is here, which hides what the image has below."""

    __slots__ = ("below", "whole")

    def __init__(self) -> None:
        self.below: dict[str, _Covered] = {}
        self.whole = False

    def add(self, path: Iterable[str]) -> None:
        place = self
        for name in path:
            place = place.below.setdefault(name, _Covered())
        place.whole = True


class _Resolver:
    """Resolves paths one after the other, in steps of one name: an image may have paths of any depth."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._covered = _Covered()
        for name in KERNEL_DIRECTORIES:
            self._covered.add([name])
        self._parts = 0

    def resolve(self, path: str) -> str:
        """The real path, at which a mount is from now on."""
        try:
            if b"\0" in os.fsencode(path):
                raise ValueError("a zero byte")  # noqa: TRY301 - as for half of a surrogate pair
        except ValueError as e:
            raise FailedPreconditionError(f"mount {path[:200]!r}: no file can have this path ({e})") from e
        here = self._follow(path)
        self._covered.add(here)
        return "/" + "/".join(here)

    def _follow(self, path: str) -> list[str]:
        todo, here, links = path.split("/")[::-1], list[str](), 0
        # The directory ``at`` is the one of the first ``depth`` names of ``here``. Those behind it are not looked up:
        # they do not exist, are no directory, or are covered.
        at, depth = os.dup(self._root), 0
        covers: list[_Covered | None] = [self._covered]  # of each beginning of ``here``; None where nothing is covered
        hidden = 1 if self._covered.whole else 0  # the number of beginnings that are at or below a mount
        try:
            while todo:
                part = todo.pop()
                self._count(path)
                if part in ("", "."):
                    continue
                if part == "..":
                    if not here:
                        continue
                    if depth == len(here):
                        at, depth = _entered("..", at), depth - 1
                    here.pop()
                    covers.pop()
                    hidden = max(hidden - 1, 0)
                    continue
                above = covers[-1]
                cover = None if above is None else above.below.get(part)
                if depth == len(here) and not hidden and not (cover is not None and cover.whole):
                    target = link_target(part, at)
                    if target is not None:
                        links += 1
                        if links > _MAX_LINKS:
                            raise FailedPreconditionError(
                                f"mount {path}: the image has links in this path that lead in a circle"
                            )
                        if target.startswith("/"):
                            at, depth, here = _instead(self._root, at), 0, []
                            del covers[1:]
                        todo += target.split("/")[::-1]
                        continue
                    try:
                        at, depth = _entered(part, at), depth + 1
                    except OSError as e:
                        if e.errno not in _NO_DIRECTORY:
                            raise
                here.append(part)
                covers.append(cover)
                if hidden or (cover is not None and cover.whole):
                    hidden += 1
            return here
        finally:
            os.close(at)

    def _count(self, path: str) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise FailedPreconditionError(
                f"mount {path[:200]}: the mounts of the container and the volumes of its image have more than "
                f"{_MAX_PARTS} names in their paths, those of the image's links too"
            )


def _instead(new: int, old: int) -> int:
    """A copy of the descriptor ``new``, in place of ``old``, which is closed."""
    copy = os.dup(new)
    os.close(old)
    return copy


def _entered(name: str, directory: int) -> int:
    """A descriptor of a directory in ``directory``, in place of that of ``directory``, which is closed."""
    inner = os.open(name, _PATH, dir_fd=directory)
    os.close(directory)
    return inner


async def _in_time(work: Callable[[], T], key: Hashable, what: str) -> T:
    """Look up a path of the node, with a timeout: a dead network file system never answers.

    Each lookup has a thread of its own, so that others go on. A caller that asks again waits for the same lookup. If
    that one hangs, it begins another one: the file system may have been mounted anew.
    """
    try:
        async with asyncio.timeout(HOST_PATH_TIMEOUT):
            return cast(T, await _lookups.run(key, lambda: in_loose_thread(work, "host-path")))
    except TimeoutError:
        raise DeadlineExceededError(f"{what} does not answer within {HOST_PATH_TIMEOUT:g} s") from None


def _resolved(mount: Mount) -> Mount:
    """The mount with the node's links resolved. A missing directory is made, as hostPath volumes expect."""
    real = os.path.realpath(mount.host_path)
    _check_propagation(mount, real)
    if not os.path.lexists(real):
        try:
            os.makedirs(real, mode=0o755)
        except FileExistsError:
            pass  # another container has made it meanwhile
        except OSError as e:
            message = f"mount {mount.container_path}: host path {mount.host_path} cannot be made: {e.strerror}"
            raise InvalidArgumentError(message) from e
    return dataclasses.replace(mount, host_path=real)


def _check_propagation(mount: Mount, path: str) -> None:
    """Raises FailedPreconditionError if the node's mount at ``path`` cannot propagate mounts as requested."""
    if mount.propagation is Propagation.PRIVATE:
        return
    while not os.path.lexists(path):
        path = os.path.dirname(path)  # the missing directory will be made in this one
    point, tags = mounts.mount_of(path)
    suitable = ("shared:",) if mount.propagation is Propagation.BIDIRECTIONAL else ("shared:", "master:")
    if not any(tag.startswith(suitable) for tag in tags):
        raise FailedPreconditionError(
            f"mount {mount.container_path}: propagation {mount.propagation.name} of {path} needs a shared mount, and "
            f"{point} is not one; run `mount --make-rshared {point}` on the node"
        )
