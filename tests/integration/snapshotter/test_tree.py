"""Trees that only root can make or delete: mounts in them, attributes that forbid deletion, devices."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.runtime import selinux
from snapshotter import copies, file_tree, mounts, removal
from tests.support.descriptors import open_on

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with a directory ``t`` for a tree."""
    point = tmp_path / "disk"
    point.mkdir()
    if request.param == "tmpfs":
        mounts.mount("tmpfs", str(point), "tmpfs")
    else:
        image = tmp_path / "image"
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-N", "20000", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, check=False).returncode:
            pytest.skip("no loop device")
    try:
        (point / "t").mkdir()
        yield point
        assert open_on(point) == []
    finally:
        for below in [*mounts.mounts_below(str(point)), str(point)]:
            mounts.umount2(below, mounts.MNT_DETACH)


def set_attribute(letter: str, path: Path) -> None:
    if subprocess.run(["chattr", f"+{letter}", path], capture_output=True, check=False).returncode:
        pytest.skip("the file system has no such attributes")


@pytest.mark.parametrize("bound", ["tmpfs", "of the same file system", "an empty one", "file"])
def test_what_is_mounted_in_a_tree_stays_and_is_named(disk: Path, bound: str) -> None:
    (disk / "other/sub").mkdir(parents=True)
    (disk / "other/sub/kept").touch()
    point = disk / "t/a/b/point"
    point.parent.mkdir(parents=True)
    (disk / "t/a/file").touch()
    if bound == "file":
        point.touch()
        mounts.mount(str(disk / "other/sub/kept"), str(point), None, mounts.MS_BIND)
    else:
        point.mkdir()
        if bound == "of the same file system":
            mounts.mount(str(disk / "other"), str(point), None, mounts.MS_BIND)
        else:
            mounts.mount("tmpfs", str(point), "tmpfs")
    if bound == "tmpfs":
        (point / "kept").touch()
    with pytest.raises(OSError, match=r"mounted.*unmount it first.*t/a/b/point'"):
        removal.remove_path(str(disk / "t"))
    assert str(point) in mounts.mounts_below(str(disk))
    assert os.listdir(disk / "other/sub") == ["kept"]
    assert bound != "tmpfs" or os.listdir(point) == ["kept"]
    assert os.listdir(disk / "t/a") == ["b"]
    # Neither is it of what the tree occupies.
    assert file_tree.measure(str(disk / "t")).inodes == 4
    mounts.umount2(str(point))
    removal.remove_path(str(disk / "t"))
    assert not (disk / "t").exists()
    assert os.listdir(disk / "other/sub") == ["kept"]


@pytest.mark.parametrize("letter", ["i", "a"])
def test_attributes_that_forbid_deletion_are_taken_away(disk: Path, letter: str) -> None:
    (disk / "t/d/full").mkdir(parents=True)
    (disk / "t/d/empty").mkdir()
    (disk / "t/d/link").symlink_to("/etc/passwd")
    (disk / "t/d/full/f").touch()
    for name in ("t/d/full/f", "t/d/full", "t/d/empty", "t/d", "t"):
        set_attribute(letter, disk / name)
    removal.remove_path(str(disk / "t"))
    assert not (disk / "t").exists()


def test_attributes_that_stay_are_named_with_what_to_do(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "t/d").mkdir(parents=True)
    (disk / "t/d/f").touch()
    (disk / "t/other").touch()
    set_attribute("i", disk / "t/d/f")
    with monkeypatch.context() as patch:
        patch.setattr(removal, "_SET_FLAGS", 0)
        with pytest.raises(PermissionError, match=r"immutable or append-only; run `chattr -i -a` on it.*t/d/f'"):
            removal.remove_path(str(disk / "t"))
    assert os.listdir(disk / "t") == ["d"]
    removal.remove_path(str(disk / "t"))
    assert not (disk / "t").exists()


def test_devices_are_deleted_and_not_opened(disk: Path) -> None:
    os.mknod(disk / "t/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(disk / "t/none", stat.S_IFBLK | 0o666, os.makedev(240, 77))
    os.mkfifo(disk / "t/pipe")
    set_attribute("i", disk / "t")
    removal.remove_path(str(disk / "t"))
    assert not (disk / "t").exists()


def test_directories_without_permissions(disk: Path) -> None:
    (disk / "t/a/b").mkdir(parents=True)
    (disk / "t/a/b/f").touch()
    for name in ("t/a/b", "t/a", "t"):
        os.chmod(disk / name, 0)
        os.chown(disk / name, 12345, 12345)
    assert file_tree.measure(str(disk / "t")).inodes == 4
    removal.remove_path(str(disk / "t"))
    assert not (disk / "t").exists()


def test_a_process_that_makes_files_is_outlasted(disk: Path) -> None:
    """As one that is just being killed does."""
    script = "mkdir -p a/b; while :; do echo > a/b/$RANDOM; echo > a/$RANDOM; mkdir -p a/b/c; done 2>/dev/null"
    maker = subprocess.Popen(["bash", "-c", f"cd {disk}/t; ({script}) & sleep 0.3; kill $!"])
    deadline = time.monotonic() + 60
    while not (disk / "t/a/b/c").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        while True:
            try:
                removal.remove_path(str(disk / "t"))
                break
            except file_tree.UnsettledError:
                assert time.monotonic() < deadline
    finally:
        maker.wait()
    assert not (disk / "t").exists()


def test_a_copy_has_devices_owners_and_capabilities(disk: Path) -> None:
    (disk / "t/s/d").mkdir(parents=True)
    (disk / "t/c").mkdir()
    os.mknod(disk / "t/s/null", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    (disk / "t/s/program").touch()
    os.chown(disk / "t/s/program", 5, 6)
    os.chmod(disk / "t/s/program", 0o6755)
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(disk / "t/s/program", "security.capability", capability)
    (disk / "t/s/link").symlink_to("nowhere")
    os.chown(disk / "t/s/link", 7, 8, follow_symlinks=False)
    os.chown(disk / "t/s/d", 9, 10)
    fds = [os.open(disk / name, os.O_RDONLY) for name in ("t/s", "t/c")]
    copies.copy(fds[0], fds[1], lambda: None)
    for fd in fds:
        os.close(fd)
    for name in ("null", "program", "link", "d"):
        one, other = os.lstat(disk / "t/s" / name), os.lstat(disk / "t/c" / name)
        assert (one.st_mode, one.st_uid, one.st_gid, one.st_rdev) == (
            other.st_mode,
            other.st_uid,
            other.st_gid,
            other.st_rdev,
        )
    assert os.getxattr(disk / "t/c/program", "security.capability") == capability


@pytest.mark.skipif(selinux.is_enabled(), reason="the policy may not have this label")
def test_a_deep_volume_is_labelled_and_what_is_mounted_in_it_is_not(disk: Path) -> None:
    point = disk / "t/mounted"
    point.mkdir()
    mounts.mount("tmpfs", str(point), "tmpfs")
    (point / "file").touch()
    fd = os.open(disk / "t", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("dd", dir_fd=fd)
        below = os.open("dd", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.symlink("/etc/passwd", "bottom", dir_fd=fd)
    selinux.relabel(str(disk / "t"), LABEL)
    found = os.getxattr(f"/proc/self/fd/{fd}/bottom", "security.selinux", follow_symlinks=False)
    os.close(fd)
    assert found == LABEL.encode() + b"\0"
    with pytest.raises(OSError):
        os.getxattr(point / "file", "security.selinux")
