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
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from criserver.images import Image
from criserver.model import Device, Mount, PodConfig, Propagation
from criserver.oci.spec_inputs import DeviceNode
from criserver.runtime import host, selinux
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import user_pin
from criserver.runtime.records import Container
from criserver.telemetry import operations
from snapshotter import SnapshotError, SnapshotNotFoundError, acl, copies, files, mounts, removal
from snapshotter.tasks import outlive
from snapshotter.threads import Threads

T = TypeVar("T")

# Seconds that looking up a host path may take.
HOST_PATH_TIMEOUT = 20.0
# The runtime mounts the kernel's file systems here. An image's volume in one of them would hide it, so it is ignored.
_KERNEL_DIRECTORIES = ("dev", "proc", "sys")
_MAX_LINKS = 40  # as many as the kernel follows (path_resolution(7))
# A dead file system may hold these threads for ever. Unmounts and deletions need threads too, so they have others.
_host_paths = Threads(8, "host-paths")
_copies = Threads(4, "volumes")


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
    resolved_paths = await asyncio.to_thread(_resolve_in_image, rootfs, paths)
    resolved = []
    for number, mount in enumerate(requested):
        mount = dataclasses.replace(mount, container_path=resolved_paths[mount.container_path])
        if mount.image:
            path = await _mount_image(node, container, number, mount)
            if user is not None:
                mount = dataclasses.replace(mount, uids=(), gids=())  # the image is mounted with the pod's mapping
            resolved.append(dataclasses.replace(mount, host_path=path, guarded=True))
        else:
            what = f"mount {mount.container_path}: host path {mount.host_path}"
            resolved.append(await _in_time(partial(_resolved, mount), what))
    covered = {mount.container_path for mount in resolved}
    volumes = []
    for number, volume in enumerate(sorted({resolved_paths[volume] for volume in image_volumes} - covered)):
        if volume == "/" or volume.split("/")[1] in _KERNEL_DIRECTORIES:
            continue
        path = os.path.join(_volumes_dir(node, container.id), str(number))
        await _copy_up(rootfs, volume, path, root)
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


def _resolve_in_image(rootfs: str, paths: Iterable[str]) -> dict[str, str]:
    """The real path of each container path, through the image's links, as the OCI runtime resolves them. Blocks.

    A mount hides the image's files below it, so no link there is followed. Mounts of parent directories are made first.
    Raises FailedPreconditionError for links that lead in a circle.
    """
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolved, covered = dict[str, str](), {f"/{name}" for name in _KERNEL_DIRECTORIES}
        for path in sorted(paths, key=lambda path: path.rstrip("/").count("/")):
            resolved[path] = _resolve_path(root, path, covered)
            covered.add(resolved[path])
        return resolved
    finally:
        os.close(root)


def _resolve_path(root: int, path: str, covered: Set[str]) -> str:
    todo, here, links = path.split("/")[::-1], list[str](), 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here[:-1]
        elif part not in ("", "."):
            whole = [*here, part]
            if any("/" + "/".join(whole[:depth]) in covered for depth in range(len(whole) + 1)):
                here = whole
                continue
            try:
                target = os.readlink("/".join(whole), dir_fd=root)
            except OSError:
                here = whole  # it is no link, or does not exist yet
                continue
            links += 1
            if links > _MAX_LINKS:
                raise FailedPreconditionError(f"mount {path}: the image has links in this path that lead in a circle")
            here = [] if target.startswith("/") else here
            todo += target.split("/")[::-1]
    return "/" + "/".join(here)


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
    await delete(_volumes_dir(node, container_id), node.container_dir(container_id))


async def delete(*paths: str) -> None:
    """Delete files or directory trees that containers may have written to, in this order.

    Raises CriError with the reason for one that cannot be deleted. Those after it stay too.
    """

    def remove() -> None:
        for path in paths:
            try:
                removal.remove_path(path)
            except OSError as e:
                raise CriError(f"{path} cannot be deleted: {e}") from e

    await asyncio.to_thread(remove)


def owner(key: str) -> str:
    """The ID of the container to which a snapshot or a directory of volumes belongs, from its key."""
    return key.partition(".")[0]


def volumes_root(node: Node) -> str:
    """The directory of images' volumes; each container has a directory in it."""
    return os.path.join(node.config.root, "volumes")


def _volumes_dir(node: Node, container_id: str) -> str:
    return os.path.join(volumes_root(node), container_id)


async def _in_time(work: Callable[[], T], what: str) -> T:
    """Look up a host path in a thread, with a timeout: a dead network file system never answers."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HOST_PATH_TIMEOUT):
            return await loop.run_in_executor(_host_paths, work)
    except TimeoutError:
        raise DeadlineExceededError(f"{what} does not answer within {HOST_PATH_TIMEOUT:g} s") from None


async def device_nodes(devices: Iterable[Device]) -> dict[Device, DeviceNode]:
    """The node of each device. A device that is a directory is replaced by one for each node in it.

    Raises InvalidArgumentError as :func:`criserver.runtime.host.device_nodes` does.
    """
    nodes = {}
    for device in devices:
        found = await _in_time(
            partial(host.device_nodes, device.host_path, device.container_path), f"device {device.host_path}"
        )
        nodes.update({Device(node.path, path, device.permissions): node for path, node in found.items()})
    return nodes


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
        fd = _open_inside(point, mount.image_sub_path)
    except OSError as e:
        raise NotFoundError(
            f"mount {mount.container_path}: {mount.image_sub_path!r} in image {mount.image}: {e.strerror}"
        ) from e
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


async def _copy_up(rootfs: str, volume: str, target: str, root: tuple[int, int]) -> None:
    """Make a volume with what the image has at its path: content, owners, modes and extended attributes.

    A volume at a path that the image does not have belongs to ``root``, the IDs of the pod's root on the node.
    """
    files.make_private(os.path.dirname(target))
    os.mkdir(target, 0o755)
    try:
        fd = _open_inside(rootfs, volume)
    except FileNotFoundError:
        os.chown(target, *root)
        return
    except OSError as e:
        raise FailedPreconditionError(f"the image's volume {volume}: {e.strerror}") from e
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            raise FailedPreconditionError(f"the image's volume {volume} is {files.kind(mode)} in it, not a directory")
        await _copy(fd, target)
    except OSError as e:
        raise CriError(f"the image's volume {volume} cannot be copied: {e}") from e
    finally:
        os.close(fd)


async def _copy(source: int, target: str) -> None:
    """Copy a directory, given by a path descriptor, in a thread. A cancelled caller waits for the end of the thread."""
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise InterruptedError("the creation of its container was cancelled")

    def work() -> None:
        with ExitStack() as stack:
            fds = []
            for path in (f"/proc/self/fd/{source}", target):
                fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            copies.copy(fds[0], fds[1], check)

    copying = asyncio.get_running_loop().run_in_executor(_copies, work)
    try:
        await outlive(copying)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait([copying])
        raise


def _open_inside(root: str, path: str) -> int:
    """A path descriptor of a file or directory in an image; links cannot lead out of the image. Raises OSError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.openat2(directory, path.lstrip("/") or ".", os.O_PATH, mounts.RESOLVE_IN_ROOT)
    finally:
        os.close(directory)
