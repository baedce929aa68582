"""A user namespace of a pod, made and pinned. Its directory is checked after the test."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from criserver.model import IdMapping
from criserver.network import namespaces
from criserver.network.namespaces import PinnedNamespaces, UserMapping
from snapshotter import mounts
from tests.support.waiting import eventually

UID = 200_000
GID = 300_000
NS_GET_USERNS = 0xB701
USER = UserMapping((IdMapping(0, UID, 65536),), (IdMapping(0, GID, 65536),))


@pytest.fixture
def base() -> Iterator[str]:
    """A directory on a tmpfs of its own, on which nothing is mounted after a test but what it made there itself."""
    base = tempfile.mkdtemp(prefix="cri-userns-", dir="/run")
    os.chmod(base, 0o711)
    mounts.mount("tmpfs", base, "tmpfs", 0, "mode=0711")
    gc.collect()  # what earlier tests' rubbish has open does not count
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        yield base
        assert mounts.mounts_below(base) == []
        for thread in threading.enumerate():
            if thread.name == "namespaces":  # one may be about to end
                thread.join(30)
                assert not thread.is_alive()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        eventually(lambda: not children())  # the last one may not be reaped yet
    finally:
        for point in [*mounts.mounts_below(base), base]:
            mounts.umount2(point, mounts.MNT_DETACH)
        os.rmdir(base)


@pytest.fixture
async def pod(base: str) -> AsyncIterator[PinnedNamespaces]:
    yield await namespaces.make(f"{base}/ns", net=False, ipc=False, uts=False, user=USER)
    namespaces.unpin(f"{base}/ns")


def children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return f.read().split()


def inside(pin: PinnedNamespaces, *command: str, cwd: str = "/") -> str:
    """What a command of the pod's root prints in the pod's namespaces."""
    enter = [f"--{kind}={path}" for kind in ("user", "net", "ipc", "uts") if (path := getattr(pin, kind))]
    command = ("nsenter", *enter, "--setuid=0", "--setgid=0", *command)
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def owner_of(path: str) -> int:
    """The inode of the user namespace that owns the namespace ``path``."""
    with open(path, "rb") as f:
        fd = fcntl.ioctl(f, NS_GET_USERNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)
