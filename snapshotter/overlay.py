"""Overlay mounts of layers and writable snapshots, for user namespaces too.

mount(2) takes one page of options, so layers are named by paths relative to layers/: ``lowerdir=7/fs:3/fs``. The mounts
are made by threads that have that directory as their own.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from snapshotter import mounts, removal
from snapshotter.errors import HelperKilledError, HelperTimeoutError, SnapshotError, is_temporary
from snapshotter.metadata import Layer, Snapshot
from snapshotter.staging import Staging
from snapshotter.threads import Threads, in_thread

_T = TypeVar("_T")

_MAX_OPTIONS = 4095  # mount(2) takes one page, with a zero at its end
_THREADS = 4
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_USERNS_SECONDS = 10.0  # to start a process and have it make a user namespace, which takes milliseconds

# Makes a user namespace, writes "0" when it is there, and ends with its parent.
_USERNS_MAKER = """
import ctypes, os
os.write(1, b"%d" % ctypes.CDLL(None).unshare(0x10000000))
os.read(0, 1)
"""


class OverlayMounter:
    """Mounts the layers and snapshots below ``root``; a chain of layers is given with the topmost layer first.

    Methods raise SnapshotError.
    """

    def __init__(self, root: str, staging: Staging) -> None:
        self._root = root
        self._layers = os.path.join(root, "layers")
        self._staging = staging
        self._idmap_trouble: str | None = None
        self._trying_idmap = asyncio.Lock()
        self._threads = Threads(_THREADS, "mounts")

    def close(self) -> None:
        """End the threads. What is mounted stays mounted."""
        self._threads.shutdown()

    async def mount(
        self, snapshot: Snapshot, chain: Sequence[Layer], target: str, *, userns: str | None, label: str
    ) -> None:
        """Mount a snapshot on its layers, writable; see :meth:`Snapshotter.mount`."""
        # Relative to the thread's directory, which is layers/ or, with mapped owners, a directory in staging/.
        upper = f"../active/{snapshot.key}" if userns is None else f"../../active/{snapshot.key}"
        # 1. volatile: no sync of the whole file system at the unmount. That sync is for a crash of the node, and a
        #    snapshot is not used again after one.
        # 2. index=off: an index would tie the upper directory to these layers by file handles, and copies of the
        #    layers have other file handles.
        # 3. xino stays at the kernel's "auto".
        options = f"{_lowerdir(chain)},upperdir={upper}/fs,workdir={upper}/work,index=off,volatile"
        if label:
            options += f',context="{label}"'
        if userns is None:
            await self._mount(_mount_snapshot, target, options, snapshot)
        else:
            await self._mount(self._mount_mapped, target, options, snapshot, chain[0], userns)

    async def mount_layers(self, chain: Sequence[Layer], target: str) -> None:
        """Mount layers alone, read-only."""
        # With an empty layer below, one layer is mounted as several are: overlayfs wants two.
        await self._mount(_mount_overlay, target, f"{_lowerdir(chain)}:../empty,index=off", mounts.MS_RDONLY)

    async def unmount(self, *targets: str) -> None:
        """Unmount all that is mounted on ``targets``; see :meth:`Snapshotter.unmount`."""
        await self.run(_unmount, *map(os.path.abspath, targets))

    async def idmap_trouble(self) -> str:
        """Why snapshots cannot be mounted for a user namespace; see :meth:`Snapshotter.idmap_trouble`."""
        async with self._trying_idmap:
            if self._idmap_trouble is None:
                try:
                    async with _user_namespace() as userns:
                        await self.run(self._in_layers, self._try_idmap, userns)
                    self._idmap_trouble = ""
                except (SnapshotError, OSError) as e:
                    if is_temporary(e):
                        raise
                    self._idmap_trouble = f"snapshots cannot be mounted for user namespaces: {e}"
            return self._idmap_trouble

    async def run(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Make a blocking call in one of the threads, which may have any working directory."""
        return await in_thread(call, *arguments, executor=self._threads)

    async def _mount(self, call: Callable[..., None], target: str, options: str, *arguments: Any) -> None:
        if len(os.fsencode(options)) > _MAX_OPTIONS:
            raise SnapshotError(f"cannot mount {target}: its layers do not fit into one page of options")
        place = os.path.abspath(target)
        try:
            await self.run(self._in_layers, call, place, options, *arguments)
        except asyncio.CancelledError:
            await self.run(_unmount, place)
            raise

    def _mount_mapped(self, target: str, options: str, snapshot: Snapshot, top: Layer, userns: str) -> None:
        try:
            with self._mapped(self._layers, userns):
                _map_root(snapshot, os.path.join(os.path.basename(top.path), "fs"))
                _mount_snapshot(target, options, snapshot)
        except (SnapshotError, OSError) as e:
            raise SnapshotError(
                f"no mount for the user namespace {userns}, which takes Linux 5.19 or newer and a file system with "
                f"id-mapped mounts below {self._root}: {e}"
            ) from e

    def _try_idmap(self, userns: str) -> None:
        area = self._staging.new()
        try:
            for name in ("one", "two", "target"):
                os.mkdir(os.path.join(area, name))
            target = os.path.join(area, "target")
            with self._mapped(area, userns):
                _mount_overlay(target, "lowerdir=one:two", mounts.MS_RDONLY)
            _unmount(target)
        finally:
            self._staging.discard(area)

    @contextmanager
    def _mapped(self, source: str, userns: str) -> Iterator[None]:
        """While the block lasts, this thread's directory is ``source`` with owners mapped into a user namespace.

        That is a mount in staging/. It goes afterwards, as an overlay has its own copies of the mounts below it.
        """
        point = self._staging.new()
        try:
            mounts.bind_idmapped(source, point, userns, mounts.MOUNT_ATTR_RDONLY)
            try:
                os.chdir(point)
                yield
            finally:
                os.chdir("/")  # the mount is busy while it has the working directory of this thread
                _unmount(point)
        finally:
            os.rmdir(point)

    def _in_layers(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call with layers/ as this thread's directory, whatever an earlier call has left."""
        try:
            # Without CLONE_FS the chdir would be for the whole daemon.
            mounts.unshare(mounts.CLONE_FS)
            os.chdir(self._layers)
        except OSError as e:
            raise SnapshotError(f"cannot enter {self._layers}: {e.strerror}") from e
        call(*arguments)


def _lowerdir(chain: Sequence[Layer]) -> str:
    lower = []
    for layer in chain:
        lower.append(f"{os.path.basename(layer.path)}/fs")
        if layer.opaque:
            break  # overlayfs does not read the mark of a layer's root
    return f"lowerdir={':'.join(lower)}"


def _mount_snapshot(target: str, options: str, snapshot: Snapshot) -> None:
    try:
        _forget_volatile(os.path.join(snapshot.path, "work"))
    except OSError as e:
        raise SnapshotError(f"cannot mount the overlay on {target}: {e.strerror} ({options})") from e
    _mount_overlay(target, options)


def _mount_overlay(target: str, options: str, flags: int = 0) -> None:
    try:
        mounts.mount("overlay", target, "overlay", flags, options)
    except OSError as e:
        raise SnapshotError(f"cannot mount the overlay on {target}: {e.strerror} ({options})") from e


def _forget_volatile(work: str) -> None:
    """Remove the mark of an earlier volatile mount (work/incompat/volatile), which forbids another mount.

    The mark is for a crash of the node between the two mounts, after which no snapshot is used again.
    """
    fd = os.open(work, _DIRECTORY)
    try:
        inner = os.open("work", _DIRECTORY, dir_fd=fd)
    except FileNotFoundError:
        return
    finally:
        os.close(fd)
    try:
        removal.remove(inner, "incompat")
    finally:
        os.close(inner)


def _map_root(snapshot: Snapshot, top: str) -> None:
    """Give a snapshot's root directory the owner of the image's root directory ``top``, as the owners are mapped now.

    This is for the first mount only, which makes work/work: after it the container may have changed the owner.
    """
    if not os.path.exists(os.path.join(snapshot.path, "work", "work")):
        status = os.stat(top)
        os.chown(os.path.join(snapshot.path, "fs"), status.st_uid, status.st_gid)


@asynccontextmanager
async def _user_namespace() -> AsyncIterator[str]:
    """Yields the file of a user namespace, in which user and group 0 are the node's 1, while the block lasts."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", _USERNS_MAKER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={},
    )
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(_USERNS_SECONDS):
                told = await process.stdout.read(2)
        except TimeoutError:
            raise HelperTimeoutError(f"the kernel did not make a user namespace within {_USERNS_SECONDS:g} s") from None
        if not told and (code := await process.wait()) < 0:
            raise HelperKilledError(f"the process in a new user namespace was ended by signal {-code}")
        if told != b"0":
            raise SnapshotError("the kernel makes no user namespace")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process.pid}/{name}", "w") as file:
                file.write("0 1 1")
        yield f"/proc/{process.pid}/ns/user"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _unmount(*targets: str) -> None:
    for target in targets:
        try:
            mounts.unmount(target)
        except OSError as e:
            raise SnapshotError(f"cannot unmount {target}: {e.strerror}") from e
