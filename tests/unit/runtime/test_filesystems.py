"""Host paths of mounts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from criserver.model import Mount, Propagation
from criserver.runtime import filesystems


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
        mount = filesystems._resolved(Mount("/m", str(path), False, Propagation.PRIVATE))
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
    found = filesystems._resolve_in_image(str(tmp_path), paths)
    assert [found[path] for path in paths] == real
