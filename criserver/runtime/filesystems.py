"""What a container's file tree is made of: its root, the volumes of its image, and other images as volumes.

All that is written to lies below the root directory, on disk; what is mounted lies below the container's
directory, and everything is found again by the container's ID alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import threading
from collections.abc import Iterable
from contextlib import ExitStack

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from criserver.images import Image
from criserver.model import Mount, PodConfig, Propagation
from criserver.runtime import selinux
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import user_pin
from criserver.runtime.records import Container
from snapshotter import SnapshotError, SnapshotNotFoundError, acl, copies, files, mounts, removal
from snapshotter.tasks import outlive
from snapshotter.threads import Threads

# Seconds.
HOST_PATH_TIMEOUT = 20.0
# Where the runtime mounts what the kernel shows. What an image has there would hide it, and hides nothing instead.
_THE_KERNELS = ("dev", "proc", "sys")
_MAX_LINKS = 40  # as the kernel follows (path_resolution(7))
# Of its own: threads that a dead file system holds must not be those that unmounts and deletions need.
_host_paths = Threads(8, "host-paths")
_copies = Threads(4, "volumes")


async def make_root(node: Node, container: Container, image: Image) -> str:
    """Mount the container's root file system, the image with a writable layer over it; where it is mounted."""
    rootfs = make_directory(node, container.id, node.registry.sandbox(container.sandbox_id).config)
    await _mount(node, container, container.id, image, rootfs)
    return rootfs


def make_directory(node: Node, key: str, config: PodConfig) -> str:
    """Make a container's directory with a place for its root file system, and return that.

    Nobody but root looks into it: it has environment variables, and the set-user-ID programs of images. The root
    user of a user namespace has to get through to its file system, and no further (see passage.py).
    """
    directory, rootfs = node.container_dir(key), node.rootfs(key)
    files.make_private(os.path.dirname(directory))
    os.mkdir(directory, 0o700)
    if config.namespaces.user is not None:
        acl.let_pass(directory, {config.namespaces.user.uids.host_id})
    os.mkdir(rootfs, 0o711)  # the infra process is not root's, and has this for its root
    if config.namespaces.user is not None:
        os.chown(rootfs, config.namespaces.user.uids.host_id, config.namespaces.user.gids.host_id)
    return rootfs


async def _mount(node: Node, container: Container, key: str, image: Image, point: str) -> None:
    """Make a writable snapshot of an image and mount it, its owners mapped where the pod has a user namespace."""
    sandbox = node.registry.sandbox(container.sandbox_id)
    user = sandbox.config.namespaces.user
    pinned = None if user is None else user_pin(node, container.sandbox_id)
    try:
        await node.snapshotter.prepare(key, image.chain_id)
    except SnapshotNotFoundError as e:
        raise NotFoundError(f"image {image.id} was removed while a container of it was being made: {e}") from e
    labels = selinux.labels(container.config.security, sandbox.selinux_level)
    await node.snapshotter.mount(key, point, userns=pinned, label=labels.files)


async def resolve_mounts(node: Node, container: Container, image: Image, rootfs: str) -> tuple[Mount, ...]:
    """The container's mounts with real paths of the host, and those that its image asks for before them.

    Where they come to lie is said without the image's links. Raises NotFoundError for an image or path in it that is
    not there, InvalidArgumentError for a host path that cannot be made.
    """
    wanted = container.config.mounts
    paths = [*(m.container_path for m in wanted), *image.config.volumes]
    places = await asyncio.to_thread(_places, rootfs, paths) if paths else {}
    found = []
    for number, mount in enumerate(wanted):
        mount = dataclasses.replace(mount, container_path=places[mount.container_path])
        if mount.image:
            path = await _mount_image(node, container, number, mount)
            found.append(dataclasses.replace(mount, host_path=path, guarded=True))
        else:
            found.append(await _resolved_in_time(mount))
    covered = {mount.container_path for mount in found}
    volumes = []
    for number, volume in enumerate(sorted({places[volume] for volume in image.config.volumes} - covered)):
        if volume == "/" or volume.split("/")[1] in _THE_KERNELS:
            continue
        path = os.path.join(_volumes_dir(node, container.id), str(number))
        await _copy_up(rootfs, volume, path)
        volumes.append(
            Mount(
                volume,
                path,
                readonly=False,
                propagation=Propagation.PRIVATE,
                selinux_relabel=True,
                # A privileged container may have the root file systems of containers of its own there.
                guarded=not container.config.security.privileged,
            )
        )
    return (*volumes, *found)


def _places(rootfs: str, paths: Iterable[str]) -> dict[str, str]:
    """Where paths of the container lead through the links of its image, as the OCI runtime finds it. Blocks.

    Raises FailedPreconditionError for links without end.
    """
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return {path: _place(root, path) for path in paths}
    finally:
        os.close(root)


def _place(root: int, path: str) -> str:
    todo, here, links = path.split("/")[::-1], list[str](), 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here[:-1]
        elif part not in ("", "."):
            try:
                target = os.readlink("/".join([*here, part]), dir_fd=root)
            except OSError:
                here.append(part)  # no link, or nothing yet
                continue
            links += 1
            if links > _MAX_LINKS:
                raise FailedPreconditionError(f"mount {path}: the image has links there that lead in a circle")
            here = [] if target.startswith("/") else here
            todo += target.split("/")[::-1]
    return "/" + "/".join(here)


async def unmount(node: Node, container_id: str) -> None:
    """Unmount all file systems of a container that does not run; what is not mounted is no error."""
    for point in (*mounts.mounts_below(node.container_dir(container_id)), node.rootfs(container_id)):
        await node.snapshotter.unmount(point)


async def discard(node: Node, container_id: str) -> None:
    """Unmount and delete all that a container's files are; what is gone, or was never made, is no error.

    The bundle goes last, as what is mounted is found below it. Raises CriError for what cannot be unmounted or deleted;
    the next attempt goes on from there.
    """
    try:
        await unmount(node, container_id)
        for key in node.snapshotter.removable():
            if owner(key) == container_id:
                await node.snapshotter.remove(key)
    except SnapshotError as e:
        raise CriError(f"the files of container {container_id} cannot be removed: {e}") from e
    for directory in (_volumes_dir(node, container_id), node.container_dir(container_id)):
        await delete(directory)


async def delete(path: str) -> None:
    """Delete a file or directory tree that containers may have written to. Raises CriError with what hinders it."""
    try:
        await asyncio.to_thread(removal.remove_path, path)
    except OSError as e:
        raise CriError(f"{path} cannot be deleted: {e}") from e


def owner(key: str) -> str:
    """The container that a snapshot or volume directory belongs to, by its key."""
    return key.partition(".")[0]


def volumes_root(node: Node) -> str:
    """Where the volumes of images are, a directory a container."""
    return os.path.join(node.config.root, "volumes")


def _volumes_dir(node: Node, container_id: str) -> str:
    return os.path.join(volumes_root(node), container_id)


async def _resolved_in_time(mount: Mount) -> Mount:
    """:func:`_resolved` where it holds up nobody else: a dead network file system answers never."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HOST_PATH_TIMEOUT):
            return await loop.run_in_executor(_host_paths, _resolved, mount)
    except TimeoutError:
        raise DeadlineExceededError(
            f"mount {mount.container_path}: host path {mount.host_path} does not answer within {HOST_PATH_TIMEOUT:g} s"
        ) from None


def _resolved(mount: Mount) -> Mount:
    """The mount with links of the host resolved; a directory that is not there is made, as hostPath expects."""
    real = os.path.realpath(mount.host_path)
    _check_propagation(mount, real)
    if not os.path.lexists(real):
        try:
            os.makedirs(real, mode=0o755)
        except OSError as e:
            words = f"mount {mount.container_path}: host path {mount.host_path}: {e.strerror}"
            raise InvalidArgumentError(words) from e
    return dataclasses.replace(mount, host_path=real)


def _check_propagation(mount: Mount, path: str) -> None:
    """Raises FailedPreconditionError where mounts cannot travel as is asked: the host's own mount has to take part."""
    if mount.propagation is Propagation.PRIVATE:
        return
    while not os.path.lexists(path):
        path = os.path.dirname(path)  # it will be made in there
    point, tags = mounts.mount_of(path)
    wanted = ("shared:",) if mount.propagation is Propagation.BIDIRECTIONAL else ("shared:", "master:")
    if not any(tag.startswith(wanted) for tag in tags):
        raise FailedPreconditionError(
            f"mount {mount.container_path}: propagation {mount.propagation.name} of {path} needs a shared mount, and "
            f"{point} is not one; run `mount --make-rshared {point}` on the node"
        )


async def _mount_image(node: Node, container: Container, number: int, mount: Mount) -> str:
    """Mount another image for the container to see; the path of what it is to see.

    A writable snapshot of its own, that nobody writes to, keeps the image's layers for as long as it is used.
    """
    image = node.images.get(mount.image)
    if image is None:
        raise NotFoundError(f"mount {mount.container_path}: image {mount.image} is not on this node; pull it first")
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


async def _copy_up(rootfs: str, volume: str, target: str) -> None:
    """Make a volume with what the image has at its place: content, owners, modes and attributes."""
    files.make_private(os.path.dirname(target))
    os.mkdir(target, 0o755)
    try:
        fd = _open_inside(rootfs, volume)
    except FileNotFoundError:
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
    """Copy a directory, by a path descriptor, in a thread; where the caller is cancelled, that has ended."""
    cut = threading.Event()

    def check() -> None:
        if cut.is_set():
            raise InterruptedError("its container is not wanted any more")

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
        cut.set()
        await asyncio.wait([copying])
        raise


def _open_inside(root: str, path: str) -> int:
    """A path descriptor of something in an image; links in the image never lead out of it. Raises OSError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.openat2(directory, path.lstrip("/") or ".", os.O_PATH, mounts.RESOLVE_IN_ROOT)
    finally:
        os.close(directory)
