"""An adjustment made to an OCI spec: each field set, replaced, removed. The given spec stays as it is."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError
from criserver.oci import cdi
from criserver.oci.adjustment_faults import RuntimeFacts
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_adjustment import adjust
from criserver.oci.spec_inputs import HostFacts

HOST = HostFacts(
    capabilities=(), unified_cgroups=True, swap_accounting=True, hugepage_sizes=frozenset({"2MB"}), resctrl=True
)
RUNTIME = RuntimeFacts(
    rdt=True,
    rdt_schemata=True,
    rdt_monitoring=True,
    net_devices=True,
    memory_policies=frozenset({"MPOL_BIND"}),
    process_priorities=True,
)
SPEC: dict[str, Any] = {
    "process": {
        "args": ["sleep"],
        "env": ["A=1", "B=2"],
        "oomScoreAdj": 5,
        "user": {"uid": 0, "gid": 0},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
    },
    "annotations": {"a": "1", "b": "2"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/data", "type": "bind", "source": "/old", "options": ["rbind"]},
        {"destination": "/data/x/y", "type": "bind", "source": "/deep", "options": ["rbind"]},
    ],
    "hooks": {"prestart": [{"path": "/first"}]},
    "linux": {
        "cgroupsPath": "/pods/c1",
        "namespaces": [{"type": "mount"}, {"type": "network", "path": "/n"}, {"type": "ipc", "path": "/i"}],
        "devices": [
            {"path": "/dev/a", "type": "c", "major": 1, "minor": 1},
            {"path": "/dev/b", "type": "c", "major": 1, "minor": 2},
            {"path": "/dev/b2", "type": "c", "major": 1, "minor": 2},
        ],
        "resources": {
            "memory": {"limit": 100},
            "cpu": {"shares": 2, "cpus": "0"},
            "unified": {"memory.swap.max": "0", "x.y": "1"},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 7}],
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 1, "minor": 1, "access": "rw"},
                {"allow": True, "type": "c", "major": 1, "minor": 2, "access": "rw"},
            ],
        },
        "intelRdt": {"closID": "old", "schemata": ["L3:0=1"]},
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
    },
}


def made(spec: dict[str, Any] = SPEC, host: HostFacts = HOST, **fields: Any) -> dict[str, Any]:
    before = copy.deepcopy(spec)
    after = adjust(spec, SpecAdjustment(container_id="c1", **fields), host, RUNTIME)
    assert spec == before
    return after


def at(spec: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        spec = spec[key]
    return spec


NEW = {"path": "/dev/n", "type": "b", "major": 8, "minor": 0}


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"annotations": {"a": None, "b": "3", "c": "4", "d": None}}, "annotations", {"b": "3", "c": "4"}),
        ({"env": {"C": "3=3", "B": None, "A": "", "D": None}}, "process.env", ["A=", "C=3=3"]),
        ({"args": ("run", "")}, "process.args", ["run", ""]),
        (
            {"hooks": (("prestart", {"path": "/p"}), ("poststop", {"path": "/q"}))},
            "hooks",
            {"prestart": [{"path": "/first"}, {"path": "/p"}], "poststop": [{"path": "/q"}]},
        ),
        ({"oom_score_adj": 0}, "process.oomScoreAdj", 0),
        (
            {"io_priority": {"class": "IOPRIO_CLASS_BE", "priority": 2}},
            "process.ioPriority",
            {"class": "IOPRIO_CLASS_BE", "priority": 2},
        ),
        ({"scheduler": {"policy": "SCHED_BATCH"}}, "process.scheduler", {"policy": "SCHED_BATCH"}),
        (
            {"rlimits": ({"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6},)},
            "process.rlimits",
            [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}, {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}],
        ),
        ({"cgroups_path": "/other/c1"}, "linux.cgroupsPath", "/other/c1"),
        ({"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}, "linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW"}),
        ({"memory_policy": {"mode": "MPOL_BIND", "nodes": "0"}}, "linux.memoryPolicy.nodes", "0"),
        (
            {"namespaces": {"network": "/m", "ipc": None, "pid": "", "uts": None}},
            "linux.namespaces",
            [{"type": "mount"}, {"type": "network", "path": "/m"}, {"type": "pid"}],
        ),
        ({"sysctls": {"net.core.x": "1", "net.gone": None}}, "linux.sysctl", {"net.core.x": "1"}),
        ({"net_devices": {"eth1": {"name": "a"}, "eth2": None}}, "linux.netDevices", {"eth1": {"name": "a"}}),
        ({"rdt": {"closID": "new"}}, "linux.intelRdt", {"closID": "new", "schemata": ["L3:0=1"]}),
        ({"rdt": {"closID": "new"}, "rdt_removed": True}, "linux.intelRdt", {"closID": "new"}),
        ({"devices": {"/dev/n": NEW, "/dev/b": None}}, "linux.devices", [*SPEC["linux"]["devices"][::2], NEW]),
    ],
)
def test_a_field_is_set_or_removed(fields: dict[str, Any], path: str, expected: object) -> None:
    assert at(made(**fields), path) == expected


def test_rdt_is_removed() -> None:
    assert "intelRdt" not in made(rdt_removed=True)["linux"]


def test_an_empty_adjustment_changes_nothing() -> None:
    assert made() == SPEC


@pytest.mark.parametrize(
    ("devices", "rules"),
    [
        ({"/dev/n": NEW}, [("c", 1, 1, "rw"), ("c", 1, 2, "rw"), ("b", 8, 0, "rwm")]),
        ({"/dev/n": {"path": "/dev/n", "type": "p"}}, [("c", 1, 1, "rw"), ("c", 1, 2, "rw")]),
        ({"/dev/a": None}, [("c", 1, 2, "rw")]),
        # The container has the same device by another path.
        ({"/dev/b": None}, [("c", 1, 1, "rw"), ("c", 1, 2, "rw")]),
        ({"/dev/b": None, "/dev/b2/": None}, [("c", 1, 1, "rw")]),
        ({"/dev/a": {"path": "/dev/a", "type": "c", "major": 9, "minor": 9}}, [("c", 1, 2, "rw"), ("c", 9, 9, "rw")]),
    ],
)
def test_the_device_cgroup_follows_the_devices(devices: dict[str, Any], rules: list[object]) -> None:
    first, *others = made(devices=devices)["linux"]["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert [(one["type"], one["major"], one["minor"], one["access"]) for one in others] == rules


def test_rules_of_plugins_come_last() -> None:
    rule = {"allow": True, "type": "c", "access": "r"}
    assert made(resources={"devices": [rule]})["linux"]["resources"]["devices"][-1] == rule


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ({"cpu": {"quota": 5}}, {"cpu": {"shares": 2, "cpus": "0", "quota": 5, "period": 100_000}}),
        ({"cpu": {"cpus": "1-2"}}, {"cpu": {"shares": 2, "cpus": "1-2"}}),
        # The limit of swap alone stays, as cgroup v2 counts it apart.
        ({"memory": {"limit": 50}}, {"memory": {"limit": 50}}),
        ({"memory": {"reservation": 9}}, {"memory": {"limit": 100, "reservation": 9}}),
        (
            {"memory": {"limit": 50, "swap": 80}},
            {"memory": {"limit": 50}, "unified": {"memory.swap.max": "30", "x.y": "1"}},
        ),
        ({"memory": {"swap": 130}}, {"unified": {"memory.swap.max": "30", "x.y": "1"}}),
        ({"memory": {"swap": -1}}, {"unified": {"memory.swap.max": "max", "x.y": "1"}}),
        ({"unified": {"x.y": "2"}}, {"unified": {"memory.swap.max": "0", "x.y": "2"}}),
        ({"pids": {"limit": 7}}, {"pids": {"limit": 7}}),
        (
            {"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]},
            {"hugepageLimits": [{"pageSize": "1GB", "limit": 7}, {"pageSize": "2MB", "limit": 4}]},
        ),
    ],
)
def test_resources_are_merged(asked: dict[str, Any], changed: dict[str, Any]) -> None:
    assert made(resources=asked)["linux"]["resources"] == {**SPEC["linux"]["resources"], **changed}


@pytest.mark.parametrize(
    ("unified", "memory"),
    [(True, {"limit": 50}), (False, {"limit": 50, "swap": 50})],
)
def test_a_new_memory_limit_is_no_way_to_swap(unified: bool, memory: dict[str, int]) -> None:
    spec = copy.deepcopy(SPEC)
    spec["linux"]["resources"] = {}
    host = dataclasses.replace(HOST, unified_cgroups=unified)
    resources = made(spec, host, resources={"memory": {"limit": 50}})["linux"]["resources"]
    assert resources["memory"] == memory
    assert resources.get("unified") == ({"memory.swap.max": "0"} if unified else None)


def mount(destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": "/s", "options": ["rbind", *options]}


def test_mounts_are_added_replaced_and_removed_with_parents_first() -> None:
    asked = {"/data/x/y/z": mount("/data/x/y/z"), "/data/x": mount("/data/x"), "/data/": mount("/data/"), "/proc": None}
    found = [(m["destination"], m["source"]) for m in made(mounts=asked)["mounts"]]
    assert found == [("/data/", "/s"), ("/data/x", "/s"), ("/data/x/y", "/deep"), ("/data/x/y/z", "/s")]


@pytest.mark.parametrize(
    ("before", "options", "after"),
    [
        (None, ["rprivate"], None),
        (None, ["rslave"], "rslave"),
        (None, ["rshared"], "rshared"),
        ("rslave", ["rshared"], "rshared"),
        ("rshared", ["rslave"], "rshared"),
        ("rslave", [], "rslave"),
    ],
)
def test_the_root_propagates_as_far_as_a_mount_has_to(
    before: str | None, options: list[str], after: str | None
) -> None:
    spec = copy.deepcopy(SPEC)
    if before:
        spec["linux"]["rootfsPropagation"] = before
    adjusted = made(spec, mounts={"/m": mount("/m", *options)})
    assert adjusted["linux"].get("rootfsPropagation") == after


def catalog(directory: Path) -> cdi.CdiCatalog:
    node = {"path": "/dev/gpu", "type": "c", "major": 240, "minor": 0}
    document = {
        "cdiVersion": "0.6.0",
        "kind": "v.com/gpu",
        "devices": [{"name": "0", "containerEdits": {"env": ["GPU=0"], "deviceNodes": [node]}}],
    }
    (directory / "v.json").write_text(json.dumps(document))
    return cdi.load([str(directory)])


def test_cdi_devices_come_before_the_devices_of_plugins(tmp_path: Path) -> None:
    asked = SpecAdjustment(cdi_devices=("v.com/gpu=0",), devices={"/dev/gpu": {**NEW, "path": "/dev/gpu"}})
    adjusted = adjust(SPEC, asked, HOST, RUNTIME, catalog(tmp_path))
    assert adjusted["process"]["env"] == ["A=1", "B=2", "GPU=0"]
    assert [d["type"] for d in adjusted["linux"]["devices"] if d["path"] == "/dev/gpu"] == ["b"]
    assert not [r for r in adjusted["linux"]["resources"]["devices"] if r.get("major") == 240]


@pytest.mark.parametrize("with_catalog", [True, False])
def test_an_unknown_cdi_device_is_refused_with_the_plugin(tmp_path: Path, with_catalog: bool) -> None:
    asked = SpecAdjustment(
        container_id="c1", cdi_devices=("v.com/gpu=9",), owners={("CdiDevices", "v.com/gpu=9"): "injector"}
    )
    with pytest.raises(FailedPreconditionError, match=r"NRI plugin injector adjusts CdiDevices 'v.com/gpu=9' .* c1: "):
        adjust(SPEC, asked, HOST, RUNTIME, catalog(tmp_path) if with_catalog else None)
