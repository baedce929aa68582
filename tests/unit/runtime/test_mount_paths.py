"""Real paths of mounts, on the node and in an image."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from criserver.errors import DeadlineExceededError, FailedPreconditionError
from criserver.model import Mount, Propagation
from criserver.runtime import mount_paths
from tests.support.waiting import until


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_a_missing_host_path_that_another_container_makes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "new"

    def is_made_meanwhile(_: str) -> bool:
        make(path)
        return False

    with monkeypatch.context() as patched:
        patched.setattr(os.path, "lexists", is_made_meanwhile)
        mount = mount_paths._resolved(Mount("/m", str(path), False, Propagation.PRIVATE))
    assert mount.host_path == str(path)


@pytest.mark.parametrize(
    ("paths", "real"),
    [
        (["/a/file"], ["/b/file"]),
        (["/a/../c/./up"], ["/b"]),
        (["/c/nowhere"], ["/not/there"]),
        (["/b/in", "/b"], ["/b/in", "/b"]),  # the volume at /b covers the link
        (["/a/in", "/b"], ["/b/in", "/b"]),
        (["/b/in"], ["/c"]),
        (["/new/../a/../b/in", "/new/deep/../../a/file/./x"], ["/c", "/b/file/x"]),
        (["/../../a/../../c/up/.."], ["/"]),
        (["/b/in/deeper/../..", "/b/file/../in"], ["/", "/c"]),
        (["/b", "/b/in/x/../../../a/y"], ["/b", "/b/y"]),  # below a mount no link is followed
        (["/b/in/deeper", "/b/in"], ["/c/deeper", "/c"]),
        (["/"], ["/"]),
        (["/b/in", "/"], ["/b/in", "/"]),
        (["/a", "/"], ["/a", "/"]),
        (["/dev/shm", "/dev/x/../shm"], ["/dev/shm", "/dev/shm"]),
        (["/proc", "/proc/meminfo", "/sys"], ["/proc", "/proc/meminfo", "/sys"]),  # the OCI runtime refuses the link
    ],
)
def test_the_links_of_an_image_in_the_paths_of_mounts(tmp_path: Path, paths: list[str], real: list[str]) -> None:
    for directory in ("b", "c", "dev"):
        (tmp_path / directory).mkdir()
    links = {
        "a": "b",
        "b/in": "/c",
        "c/up": "../b",
        "c/nowhere": "/not/there",
        "dev/shm": "/c",
        "proc": "c",
        "sys": "/c",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    found = mount_paths.in_image(str(tmp_path), paths)
    assert [found[path] for path in paths] == real


@pytest.mark.parametrize("path", ["/d" * 4_000_000, "/d" * 60_000 + "/.." * 60_000], ids=["deep", "deep and back"])
def test_a_path_of_any_length_is_refused_at_once(tmp_path: Path, path: str) -> None:
    """An image may have paths of megabytes as its volumes."""
    (tmp_path / "d").mkdir()
    began = time.process_time()
    with pytest.raises(FailedPreconditionError, match="more than 100000 names"):
        mount_paths.in_image(str(tmp_path), [path])
    assert time.process_time() - began < 5


def test_many_long_paths_are_refused(tmp_path: Path) -> None:
    deep = "/d" * 300
    os.makedirs(f"{tmp_path}{deep}")
    assert mount_paths.in_image(str(tmp_path), [f"{deep}/{n}" for n in range(50)])
    with pytest.raises(FailedPreconditionError, match="more than 100000 names"):
        mount_paths.in_image(str(tmp_path), [f"{deep}/{n}" for n in range(500)])


@pytest.mark.parametrize("path", ["/a\0b", "/\ud800", "/new/a\0b", "/new/\ud800"])
def test_what_can_be_no_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(FailedPreconditionError, match="no file can have this path"):
        mount_paths.in_image(str(tmp_path), [path])


async def test_a_path_that_does_not_answer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A caller that asks again waits for the same thread: a kubelet would take all threads of the node so."""
    gate, looks = threading.Event(), list[str]()

    def stuck(path: str) -> str:
        if path == "/dead":
            looks.append(path)
            gate.wait()
        return path

    monkeypatch.setattr(os.path, "realpath", stuck)
    monkeypatch.setattr(os.path, "lexists", lambda _: True)
    monkeypatch.setattr(mount_paths, "HOST_PATH_TIMEOUT", 0.05)
    dead = Mount("/m", "/dead", False, Propagation.PRIVATE)
    try:
        for _ in range(3):
            with pytest.raises(DeadlineExceededError, match="host path /dead does not answer"):
                await mount_paths.on_host(dead)
        others = [Mount("/m", f"/{n}", False, Propagation.PRIVATE) for n in range(50)]
        monkeypatch.setattr(mount_paths, "HOST_PATH_TIMEOUT", 20)
        assert await asyncio.gather(*map(mount_paths.on_host, others)) == others
        assert looks == ["/dead"]
    finally:
        gate.set()
    await until(lambda: not mount_paths._lookups)
    assert await mount_paths.on_host(dead) == dead
