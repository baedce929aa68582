"""The file tree of a container: its root file system, the volumes of its image, and other images as volumes.

Data that containers write is on disk, below the root directory. Mounts are below the container's directory. The
container's ID is enough to find all of it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Executor
from contextlib import ExitStack

from criserver.errors import (
    CriError,
    FailedPreconditionError,
    NotFoundError,
    exhaustion,
)
from criserver.images import Image
from criserver.model import Mount, PodConfig, Propagation
from criserver.runtime import mount_paths, selinux
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import user_pin
from criserver.runtime.records import Container
from criserver.telemetry import operations
from snapshotter import SnapshotError, SnapshotNotFoundError, acl, copies, files, mounts, removal
from snapshotter.tasks import outlive
from snapshotter.threads import deletions, in_loose_thread, in_thread

# So many volumes are copied at a time. A disk that stands still holds up other volumes, and nothing else.
_copies = asyncio.Semaphore(8)
# The next character in the order of texts: paths below a directory sort before the directory's path with it.
_AFTER_SLASH = chr(ord("/") + 1)


async def make_root(node: Node, container: Container, image: Image) -> str:
    """Mount the container's root file system: the image with a writable layer over it. Return the mount point."""
    rootfs = make_directory(node, container.id, node.records.sandbox(container.sandbox_id).config)
    await _mount(node, container, container.id, image, rootfs)
    return rootfs


def make_directory(node: Node, key: str, config: PodConfig) -> str:
    """Make a container's directory with a mount point for its root file system, and return the mount point.

    Only root can open the directory: it contains environment variables, and set-user-ID programs of images. The root
    user of a user namespace may pass through it to its root file system, but not list it (see userns_access.py).
    """
    directory, rootfs = node.container_dir(key), node.rootfs(key)
    files.make_private(os.path.dirname(directory))
    os.mkdir(directory, 0o700)
    if config.namespaces.user is not None:
        acl.let_pass(directory, {config.namespaces.user.uids.host_id})
    os.mkdir(rootfs, 0o711)  # the infra process has this as its root directory, and does not run as root
    if config.namespaces.user is not None:
        os.chown(rootfs, config.namespaces.user.uids.host_id, config.namespaces.user.gids.host_id)
    return rootfs


async def _mount(node: Node, container: Container, key: str, image: Image, point: str) -> None:
    """Make a writable snapshot of an image and mount it; if the pod has a user namespace, owners are mapped."""
    sandbox = node.records.sandbox(container.sandbox_id)
    user = sandbox.config.namespaces.user
    pinned = None if user is None else user_pin(node, container.sandbox_id)
    try:
        with operations.SNAPSHOT.timed():
            await node.snapshotter.prepare(key, image.chain_id)
    except SnapshotNotFoundError as e:
        raise NotFoundError(
            f"image {image.id} was removed while a container of it was being made, or its files were deleted: {e}"
        ) from e
    labels = selinux.labels(container.config.security, sandbox.selinux_level)
    with operations.MOUNT.timed():
        await node.snapshotter.mount(key, point, userns=pinned, label=labels.files)


async def resolve_mounts(
    node: Node, container: Container, image: Image, rootfs: str, own: Iterable[str]
) -> tuple[tuple[Mount, ...], Mapping[str, str]]:
    """The image's volumes, followed by the container's mounts, all with resolved paths; and the real paths of ``own``.

    1. Container paths are resolved through the image's links.
    2. Host paths are resolved through the node's links.

    ``own`` are container paths at which the daemon has mounts of its own.

    Raises NotFoundError if an image, or a path in it, does not exist, InvalidArgumentError if a host path cannot be
    made.
    """
    requested, user = container.config.mounts, container.config.namespaces.user
    root = (0, 0) if user is None else (user.uids.host_id, user.gids.host_id)
    image_volumes = () if node.config.pod_defaults.ignore_image_defined_volumes else image.config.volumes
    paths = [*(m.container_path for m in requested), *image_volumes, *own]
    resolved_paths = await asyncio.to_thread(mount_paths.in_image, rootfs, paths)
    resolved = []
    for number, mount in enumerate(requested):
        mount = dataclasses.replace(mount, container_path=resolved_paths[mount.container_path])
        if mount.image:
            path = await _mount_image(node, container, number, mount)
            if user is not None:
                mount = dataclasses.replace(mount, uids=(), gids=())  # the image is mounted with the pod's mapping
            resolved.append(dataclasses.replace(mount, host_path=path, guarded=True))
        else:
            resolved.append(await mount_paths.on_host(mount))
    covered = {mount.container_path for mount in resolved}
    volumes: list[Mount] = []
    copied = sorted({resolved_paths[volume] for volume in image_volumes} - covered)
    for number, volume in enumerate(copied):
        if volume == "/" or volume.split("/")[1] in mount_paths.KERNEL_DIRECTORIES:
            continue
        path = os.path.join(_volumes_dir(node, container.id), str(number))
        await _copy_up(rootfs, volume, path, root, hidden_places(volume, copied))
        volumes.append(
            Mount(
                volume,
                path,
                readonly=False,
                propagation=Propagation.PRIVATE,
                selinux_relabel=True,
                # A privileged container may run containers itself and have their root file systems in the volume.
                guarded=not container.config.security.privileged,
            )
        )
    return (*volumes, *resolved), resolved_paths


def hidden_places(volume: str, volumes: Sequence[str]) -> frozenset[str]:
    """The paths of other volumes below a volume, relative to it; ``volumes`` are sorted.

    Each has a copy of its own, which hides what is at its place in this one. An image may have tens of thousands of
    volumes, so only those below the volume are looked at.
    """
    below = volume + "/"
    first, end = bisect_left(volumes, below), bisect_left(volumes, volume + _AFTER_SLASH)
    return frozenset(other.removeprefix(below) for other in volumes[first:end])


async def unmount(node: Node, container_id: str) -> None:
    """Unmount all file systems of a container that does not run; they may be unmounted already."""
    with operations.UNMOUNT.timed():
        # In a thread: the kernel lets a reader of the list wait while other mounts are made.
        below = await asyncio.to_thread(mounts.mounts_below, node.container_dir(container_id))
        await node.snapshotter.unmount(*below, node.rootfs(container_id))


async def discard(node: Node, container_id: str) -> None:
    """Unmount and delete all files of a container; they may be gone already, or may never have been made.

    The container's directory is deleted last, because the mounts are found below it. Raises CriError if something
    cannot be unmounted or deleted; another call then continues from there.
    """
    try:
        await unmount(node, container_id)
        with operations.DELETE.timed():
            for key in node.snapshotter.removable():
                if owner(key) == container_id:
                    await node.snapshotter.remove(key)
    except SnapshotError as e:
        raise CriError(f"the files of container {container_id} cannot be removed: {e}") from e
    await delete(_volumes_dir(node, container_id), executor=deletions)
    await delete(node.container_dir(container_id))


async def delete(path: str, executor: Executor | None = None) -> None:
    """Delete a file or a directory tree. Raises CriError with the reason if it cannot be deleted."""

    def remove() -> None:
        try:
            removal.remove_path(path)
        except OSError as e:
            raise CriError(f"{path} cannot be deleted: {e}") from e

    await in_thread(remove, executor=executor)


def owner(key: str) -> str:
    """The ID of the container to which a snapshot or a directory of volumes belongs, from its key."""
    return key.partition(".")[0]


def volumes_root(node: Node) -> str:
    """The directory of images' volumes; each container has a directory in it."""
    return os.path.join(node.config.root, "volumes")


def _volumes_dir(node: Node, container_id: str) -> str:
    return os.path.join(volumes_root(node), container_id)


async def _mount_image(node: Node, container: Container, number: int, mount: Mount) -> str:
    """Mount another image for the container. Return the path, in the mounted image, that the container will see.

    The mount has a writable snapshot of its own, though nothing writes to it: the snapshot keeps the image's layers
    from being deleted while they are used.
    """
    image = node.images.get(mount.image)
    if image is None:
        raise NotFoundError(f"mount {mount.container_path}: image {mount.image} is not on this node; pull it first")
    await node.images.checked(image)
    key = f"{container.id}.image{number}"
    point = os.path.join(node.container_dir(container.id), f"image{number}")
    os.mkdir(point, 0o700)
    await _mount(node, container, key, image, point)
    if not mount.image_sub_path:
        return point
    try:
        return await asyncio.to_thread(_real_path, point, mount.image_sub_path)
    except OSError as e:
        if exhaustion(e):
            raise
        raise NotFoundError(
            f"mount {mount.container_path}: {mount.image_sub_path!r} in image {mount.image}: {e.strerror}"
        ) from e


def _real_path(root: str, path: str) -> str:
    """The path on the node of a file or directory in an image. Blocks. Raises OSError."""
    fd = _open_inside(root, path)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


async def _copy_up(rootfs: str, volume: str, target: str, root: tuple[int, int], hidden: Set[str]) -> None:
    """Make a volume with what the image has at its path: content, owners, modes and extended attributes.

    A volume at a path that the image does not have belongs to ``root``, the IDs of the pod's root on the node.
    Directories at the paths ``hidden`` below it are left empty. It is done in a thread, as the disk may stand still. A
    cancelled caller waits for the end of the thread.
    """
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise InterruptedError("the creation of its container was cancelled")

    def work() -> None:
        files.make_private(os.path.dirname(target))
        os.mkdir(target, 0o755)
        try:
            fd = _open_inside(rootfs, volume)
        except FileNotFoundError:
            os.chown(target, *root)
            return
        except OSError as e:
            if exhaustion(e):
                raise
            raise FailedPreconditionError(f"the image's volume {volume}: {e.strerror}") from e
        try:
            _copy(fd, volume, target, hidden, check)
        except OSError as e:
            raise CriError(f"the image's volume {volume} cannot be copied: {e}") from e
        finally:
            os.close(fd)

    async with _copies:
        copying = asyncio.ensure_future(in_loose_thread(work, "volumes"))
        try:
            await outlive(copying)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([copying])
            raise


def _copy(source: int, volume: str, target: str, hidden: Set[str], check: Callable[[], None]) -> None:
    """Copy what a path descriptor ``source`` refers to. Raises OSError and FailedPreconditionError."""
    mode = os.fstat(source).st_mode
    if not stat.S_ISDIR(mode):
        raise FailedPreconditionError(f"the image's volume {volume} is {files.kind(mode)} in it, not a directory")
    with ExitStack() as stack:
        fds = []
        for path in (f"/proc/self/fd/{source}", target):
            fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        copies.copy(fds[0], fds[1], check, hidden)


def _open_inside(root: str, path: str) -> int:
    """A path descriptor of a file or directory in an image; links cannot lead out of the image. Raises OSError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.openat2(directory, path.lstrip("/") or ".", os.O_PATH, mounts.RESOLVE_IN_ROOT)
    finally:
        os.close(directory)
