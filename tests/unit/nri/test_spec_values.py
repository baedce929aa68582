"""The messages of an adjustment in the shapes of the OCI runtime specification."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from criserver.errors import FailedPreconditionError
from criserver.nri.ownership import REMOVAL, Field, Ownership
from criserver.nri.spec_values import oci_resources, spec_adjustment, unsupported_classes, update_limits
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_inputs import HostFacts
from criserver.pb.nri.v1alpha1 import api_pb2 as nri


def value(adjust: dict[str, Any]) -> SpecAdjustment:
    return spec_adjustment("c1", json_format.ParseDict(adjust, nri.ContainerAdjustment()), nri.OwningPlugins())


@pytest.mark.parametrize(
    ("adjust", "name", "expected"),
    [
        ({"annotations": {"a": "1", "-b": ""}}, "annotations", {"a": "1", "b": None}),
        ({"env": [{"key": "A", "value": ""}, {"key": "-B"}]}, "env", {"A": "", "B": None}),
        ({"args": ["a", "b"]}, "args", ("a", "b")),
        ({"CDI_devices": [{"name": "v/c=0"}]}, "cdi_devices", ("v/c=0",)),
        (
            {"hooks": {"create_runtime": [{"path": "/h", "args": ["h"], "env": ["A=1"], "timeout": {"value": 3}}]}},
            "hooks",
            (("createRuntime", {"path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 3}),),
        ),
        ({"hooks": {"poststop": [{"path": "/h"}]}}, "hooks", (("poststop", {"path": "/h"}),)),
        (
            {
                "mounts": [
                    {"destination": "/m", "source": "/s", "type": "bind", "options": ["ro"]},
                    {"destination": "-/x"},
                ]
            },
            "mounts",
            {"/m": {"destination": "/m", "type": "bind", "source": "/s", "options": ["ro"]}, "/x": None},
        ),
        (
            {"rlimits": [{"type": "RLIMIT_CORE", "hard": "2", "soft": "1"}]},
            "rlimits",
            ({"type": "RLIMIT_CORE", "hard": 2, "soft": 1},),
        ),
    ],
)
def test_fields_of_all_systems(adjust: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(value(adjust), name) == expected


@pytest.mark.parametrize(
    ("field", "asked", "name", "expected"),
    [
        (
            "devices",
            [{"path": "/dev/x", "type": "c", "major": "1", "minor": "2"}, {"path": "-/dev/y"}],
            "devices",
            {"/dev/x": {"path": "/dev/x", "type": "c", "major": 1, "minor": 2}, "/dev/y": None},
        ),
        (
            "devices",
            [{"path": "/d", "type": "b", "file_mode": {"value": 384}, "uid": {"value": 0}, "gid": {"value": 7}}],
            "devices",
            {"/d": {"path": "/d", "type": "b", "major": 0, "minor": 0, "fileMode": 384, "uid": 0, "gid": 7}},
        ),
        ("cgroups_path", "/p", "cgroups_path", "/p"),
        ("oom_score_adj", {}, "oom_score_adj", 0),
        (
            "io_priority",
            {"class": "IOPRIO_CLASS_RT", "priority": 1},
            "io_priority",
            {"class": "IOPRIO_CLASS_RT", "priority": 1},
        ),
        ("io_priority", {"priority": 1}, "io_priority", None),
        ("scheduler", {"nice": 1}, "scheduler", None),
        (
            "scheduler",
            {"policy": "SCHED_DEADLINE", "runtime": "1", "flags": ["SCHED_FLAG_RECLAIM"], "nice": -5},
            "scheduler",
            {"policy": "SCHED_DEADLINE", "nice": -5, "runtime": 1, "flags": ["SCHED_FLAG_RECLAIM"]},
        ),
        (
            "namespaces",
            [{"type": "network", "path": "/n"}, {"type": "ipc"}, {"type": "-uts"}],
            "namespaces",
            {"network": "/n", "ipc": "", "uts": None},
        ),
        ("sysctl", {"net.a": "1", "-net.b": ""}, "sysctls", {"net.a": "1", "net.b": None}),
        (
            "net_devices",
            {"e1": {"name": "a"}, "e2": {}, "-e3": {}},
            "net_devices",
            {"e1": {"name": "a"}, "e2": {}, "e3": None},
        ),
        (
            "memory_policy",
            {"mode": "MPOL_DEFAULT", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]},
            "memory_policy",
            {"mode": "MPOL_DEFAULT", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]},
        ),
        ("rdt", {"clos_id": {"value": "a"}, "schemata": {"value": ["L3"]}}, "rdt", {"closID": "a", "schemata": ["L3"]}),
        ("rdt", {"enable_monitoring": {}}, "rdt", {"enableMonitoring": False}),
        ("rdt", {"remove": True}, "rdt_removed", True),
        ("resources", {"rdt_class": {"value": ""}}, "rdt_removed", True),
        ("resources", {"cpu": {"cpus": "0"}}, "rdt_removed", False),
        (
            "seccomp_policy",
            {
                "default_action": "SCMP_ACT_ERRNO",
                "default_errno": {"value": 38},
                "architectures": ["SCMP_ARCH_X86"],
                "flags": ["F"],
                "listener_path": "/l",
                "listener_metadata": "m",
                "syscalls": [
                    {
                        "names": ["read"],
                        "action": "SCMP_ACT_ALLOW",
                        "errno_ret": {"value": 1},
                        "args": [{"index": 1, "value": "2", "value_two": "3", "op": "SCMP_CMP_EQ"}],
                    }
                ],
            },
            "seccomp",
            {
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": 38,
                "architectures": ["SCMP_ARCH_X86"],
                "flags": ["F"],
                "listenerPath": "/l",
                "listenerMetadata": "m",
                "syscalls": [
                    {
                        "names": ["read"],
                        "action": "SCMP_ACT_ALLOW",
                        "errnoRet": 1,
                        "args": [{"index": 1, "value": 2, "valueTwo": 3, "op": "SCMP_CMP_EQ"}],
                    }
                ],
            },
        ),
    ],
)
def test_fields_of_linux(field: str, asked: Any, name: str, expected: object) -> None:
    assert getattr(value({"linux": {field: asked}}), name) == expected


def test_an_empty_adjustment_is_an_empty_value() -> None:
    assert value({}) == SpecAdjustment(container_id="c1")


def test_every_limit_has_its_oci_name() -> None:
    document = {
        "memory": {
            "limit": {"value": 1},
            "reservation": {"value": 2},
            "swap": {"value": -1},
            "kernel": {"value": 4},
            "kernel_tcp": {"value": 5},
            "swappiness": {"value": 0},
            "disable_oom_killer": {"value": True},
            "use_hierarchy": {"value": False},
        },
        "cpu": {
            "shares": {"value": 2},
            "quota": {"value": -1},
            "period": {"value": 4},
            "realtime_runtime": {"value": 5},
            "realtime_period": {"value": 6},
            "cpus": "0-1",
            "mems": "0",
        },
        "hugepage_limits": [{"page_size": "2MB", "limit": 0}],
        "unified": {"memory.high": "max"},
        "pids": {"limit": -1},
        "devices": [{"allow": True, "type": "c", "major": {"value": 1}, "access": "rw"}],
    }
    assert oci_resources(json_format.ParseDict(document, nri.LinuxResources())) == {
        "memory": {
            "limit": 1,
            "reservation": 2,
            "swap": -1,
            "kernel": 4,
            "kernelTCP": 5,
            "swappiness": 0,
            "disableOOMKiller": True,
            "useHierarchy": False,
        },
        "cpu": {
            "shares": 2,
            "quota": -1,
            "period": 4,
            "realtimeRuntime": 5,
            "realtimePeriod": 6,
            "cpus": "0-1",
            "mems": "0",
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"memory.high": "max"},
        "pids": {"limit": -1},
        "devices": [{"allow": True, "type": "c", "access": "rw", "major": 1}],
    }


def test_what_asks_for_nothing_is_left_out() -> None:
    asked = nri.LinuxResources()
    asked.memory.limit.value = 0
    asked.memory.use_hierarchy.value = True
    asked.blockio_class.value = ""
    assert oci_resources(asked) == {}
    assert unsupported_classes(asked) == {}


def test_classes_have_reasons() -> None:
    asked = nri.LinuxResources()
    asked.blockio_class.value = "slow"
    asked.rdt_class.value = "gold"
    reasons = unsupported_classes(asked)
    assert set(reasons) == {"BlockioClass", "RdtClass"}
    assert "'slow'" in reasons["BlockioClass"]
    assert "'gold'" in reasons["RdtClass"]


def test_an_owner_is_named_by_field_and_key() -> None:
    owners = Ownership()
    owners.claim("one", "c1", Field.Env, "A")
    owners.claim("two", "c1", Field.Args)
    owners.clear("three", "c1", Field.Args)
    owners.claim("four", "c2", Field.Args)
    found = spec_adjustment("c1", nri.ContainerAdjustment(), owners.message).owners
    assert found == {("Env", "A"): "one", ("Args", ""): "three"}
    assert owners.owner("c1", Field.Args) == REMOVAL + "three"


HOST = HostFacts(capabilities=(), unified_cgroups=True, swap_accounting=True)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"rdt_class": {"value": "gold"}}, Field.RdtClass),
        ({"memory": {"swappiness": {"value": 0}}}, Field.MemSwappiness),
    ],
)
def test_an_update_that_cannot_be_had_is_refused_by_plugin(asked: dict[str, Any], field: Any) -> None:
    owners = Ownership()
    owners.claim("tuner", "c1", field)
    resources = json_format.ParseDict(asked, nri.LinuxResources())
    with pytest.raises(FailedPreconditionError, match=f"NRI plugin tuner adjusts {Field.Name(field)} of container c1"):
        update_limits("c1", resources, owners.message, HOST)
    # A limit that no plugin has set is the kubelet's.
    update_limits("c1", resources, nri.OwningPlugins(), HOST)
