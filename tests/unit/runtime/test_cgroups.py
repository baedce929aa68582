"""The cgroups of pods and containers, with both drivers."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from criserver.errors import CriError, InvalidArgumentError
from criserver.runtime import cgroups

SLICE = "kubepods-burstable-pod1_2.slice"


def test_cgroupfs() -> None:
    assert cgroups.own_parent("cgroupfs", "s") == "/criserver/s"
    parent = cgroups.checked_parent("cgroupfs", "/kubepods/burstable/pod1")
    assert cgroups.spec_path(parent, "c") == cgroups.path(parent, "c") == "/kubepods/burstable/pod1/c"
    assert cgroups.pod_path(parent) == parent


def test_systemd() -> None:
    assert cgroups.own_parent("systemd", "s") == "criserver-s.slice"
    parent = cgroups.checked_parent("systemd", f"/kubepods.slice/kubepods-burstable.slice/{SLICE}")
    assert parent == SLICE
    assert cgroups.spec_path(parent, "c") == f"{SLICE}:criserver:c"
    pod = f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"
    assert cgroups.pod_path(parent) == pod
    assert cgroups.path(parent, "c") == f"{pod}/criserver-c.scope"


@pytest.mark.parametrize(("driver", "parent"), [("systemd", "/kubepods/pod1"), ("cgroupfs", SLICE)])
def test_a_parent_of_the_other_driver_is_refused(driver: str, parent: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"driver is {driver}.*cgroupDriver"):
        cgroups.checked_parent(driver, parent)


def test_the_cgroups_of_another_daemons_pods_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "roots", lambda: {"cpu": f"{tmp_path}/cpu", "memory": f"{tmp_path}/memory"})
    (tmp_path / "cpu/criserver/pod").mkdir(parents=True)
    (tmp_path / "memory/criserver").mkdir(parents=True)
    cgroups.remove_own()
    assert (tmp_path / "cpu/criserver/pod").exists()
    assert not (tmp_path / "memory/criserver").exists()
    cgroups.remove("/criserver/pod")
    cgroups.remove_own()
    assert not (tmp_path / "cpu/criserver").exists()


@pytest.mark.parametrize(
    ("roots", "parent", "path"),
    [
        ({"": "/cg"}, "kubepods-pod1.slice", "/cg/kubepods.slice/kubepods-pod1.slice/memory.events"),
        ({"": "/cg"}, "/kubepods/pod1", ""),
        ({"": "/cg/unified", "memory": "/cg/memory"}, "kubepods-pod1.slice", ""),
    ],
)
def test_the_pods_count_is_wanted_where_systemd_removes_the_containers(
    monkeypatch: pytest.MonkeyPatch, roots: dict[str, str], parent: str, path: str
) -> None:
    monkeypatch.setattr(cgroups, "roots", lambda: roots)
    assert cgroups.pod_events(parent) == path


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories that look like a cgroup with one below it."""
    monkeypatch.setattr(cgroups, "roots", lambda: {"pids": str(tmp_path)})
    (tmp_path / "pod/c/inner").mkdir(parents=True)
    for name in ("pod/c", "pod/c/inner"):
        (tmp_path / name / "cgroup.procs").write_text("")
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, wanted: str, number: int) -> None:
    """Have os.open fail for names that end so."""
    open_ = os.open

    def failing(path: str, *arguments: int, **more: int) -> int:
        if str(path).endswith(wanted):
            raise OSError(number, os.strerror(number))
        return open_(path, *arguments, **more)

    monkeypatch.setattr(os, "open", failing)


@pytest.mark.parametrize("unread", ["pod/c", "cgroup.procs"])
def test_what_cannot_be_looked_at_has_not_ended(hierarchy: Path, monkeypatch: pytest.MonkeyPatch, unread: str) -> None:
    """Without a descriptor left, a container's processes were taken for ended, and its record was forgotten."""
    refuse(monkeypatch, unread, errno.EMFILE)
    with pytest.raises(CriError, match=r"cannot see whether all processes in cgroup /pod/c have ended.*Too many open"):
        cgroups.end_processes("/pod/c", 0.05)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP])
def test_a_cgroup_that_is_gone_or_of_threads_has_no_processes(
    hierarchy: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, "cgroup.procs", number)
    assert cgroups.end_processes("/pod/c", 0.05) == []
    assert cgroups.end_processes("/pod/other", 0.05) == []


def test_a_cgroup_that_stays_is_told_of(hierarchy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_EMPTYING", 0.05)
    (hierarchy / "pod/c/cgroup.procs").unlink()
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "/pod", errno.EMFILE)
        with pytest.raises(CriError, match=r"cgroup /pod/c cannot be removed: .*Too many open files"):
            cgroups.remove("/pod/c")
    (hierarchy / "pod/c/inner/cgroup.procs").unlink()
    cgroups.remove("/pod/c")
    assert not (hierarchy / "pod/c").exists()
    cgroups.remove("/pod/c")
    cgroups.remove("/nobody/c")


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.isdir("/sys/fs/cgroup/pids"), reason="cgroup version 1, as root")
def test_a_cgroup_with_a_process_in_it_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_EMPTYING", 0.2)
    name = f"criserver-test-{os.getpid()}"
    top = Path("/sys/fs/cgroup/pids", name)
    (top / "c").mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (top / "c/cgroup.procs").write_text(str(process.pid))
            with pytest.raises(CriError, match=f"cgroup /{name} cannot be removed: there are processes in it"):
                cgroups.remove(f"/{name}")
        finally:
            process.kill()
            process.wait()
            cgroups.remove(f"/{name}")
    assert not top.exists()


@pytest.mark.parametrize(
    ("hierarchy", "names"),
    [("hugetlb", ["limit_in_bytes", "rsvd.limit_in_bytes"]), ("", ["max", "rsvd.max"])],
    ids=["version 1", "version 2"],
)
@pytest.mark.parametrize("kernel", ["new", "old"])
def test_limits_of_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hierarchy: str, names: list[str], kernel: str
) -> None:
    monkeypatch.setattr(cgroups, "roots", lambda: {hierarchy: str(tmp_path)})
    files = [tmp_path / f"hugetlb.2MB.{name}" for name in (names if kernel == "new" else names[:1])]
    for file in files:
        file.write_text("4194304\n")
    undo = cgroups.limit_huge_pages("", [{"pageSize": "2MB", "limit": 8388608}])
    assert [file.read_text().strip() for file in files] == ["8388608"] * len(files)
    assert sorted(os.listdir(tmp_path)) == sorted(file.name for file in files)
    undo()
    assert [file.read_text().strip() for file in files] == ["4194304"] * len(files)


def test_a_refused_limit_of_huge_pages_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "roots", lambda: {"": str(tmp_path)})
    for name in ("max", "rsvd.max"):
        (tmp_path / f"hugetlb.2MB.{name}").write_text("4194304\n")
    write = cgroups._write

    def refusing(path: str, value: str) -> None:
        if path.endswith("rsvd.max"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        write(path, value)

    monkeypatch.setattr(cgroups, "_write", refusing)
    with pytest.raises(OSError, match="busy"):
        cgroups.limit_huge_pages("", [{"pageSize": "2MB", "limit": 2097152}])
    assert (tmp_path / "hugetlb.2MB.max").read_text().strip() == "4194304"
