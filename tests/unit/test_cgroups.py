"""Where pods and containers are, by both drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.runtime import cgroups

SLICE = "kubepods-burstable-pod1_2.slice"


def test_cgroupfs():
    assert cgroups.own_parent("cgroupfs", "s") == "/criserver/s"
    parent = cgroups.checked_parent("cgroupfs", "/kubepods/burstable/pod1")
    assert cgroups.spec_path(parent, "c") == cgroups.path(parent, "c") == "/kubepods/burstable/pod1/c"
    assert cgroups.pod_path(parent) == parent
    assert cgroups.runtime_args(parent) == []


def test_systemd():
    assert cgroups.own_parent("systemd", "s") == "criserver-s.slice"
    parent = cgroups.checked_parent("systemd", f"/kubepods.slice/kubepods-burstable.slice/{SLICE}")
    assert parent == SLICE
    assert cgroups.spec_path(parent, "c") == f"{SLICE}:criserver:c"
    pod = f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"
    assert cgroups.pod_path(parent) == pod
    assert cgroups.path(parent, "c") == f"{pod}/criserver-c.scope"
    assert cgroups.runtime_args(parent) == ["--systemd-cgroup"]


@pytest.mark.parametrize(("driver", "parent"), [("systemd", "/kubepods/pod1"), ("cgroupfs", SLICE)])
def test_a_parent_of_the_other_driver_is_refused(driver, parent):
    with pytest.raises(InvalidArgumentError, match=f"driver is {driver}.*cgroupDriver"):
        cgroups.checked_parent(driver, parent)


def test_the_cgroups_of_another_daemons_pods_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
def test_the_pods_count_is_wanted_where_systemd_removes_the_containers(monkeypatch, roots, parent, path):
    monkeypatch.setattr(cgroups, "roots", lambda: roots)
    assert cgroups.pod_events(parent) == path
