"""What an adjustment asks and this node or its OCI runtime cannot give: an error with the plugin and the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError
from criserver.oci.adjustment_faults import RuntimeFacts, resource_faults, runtime_facts
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_adjustment import adjust
from criserver.oci.spec_inputs import HostFacts

HOST = HostFacts(
    capabilities=(),
    oom_score_adj_floor=-500,
    unified_cgroups=True,
    swap_accounting=True,
    hugepage_sizes=frozenset({"2MB"}),
    resctrl=True,
)
V1 = dataclasses.replace(HOST, unified_cgroups=False)
ABLE = RuntimeFacts(
    hooks=frozenset({"prestart"}),
    namespaces=frozenset({"network", "ipc", "uts"}),
    mount_options=frozenset({"rro", "idmap"}),
    seccomp_actions=frozenset({"SCMP_ACT_ALLOW"}),
    rdt=True,
    rdt_schemata=True,
    rdt_monitoring=True,
    net_devices=True,
    memory_policies=frozenset({"MPOL_BIND"}),
    process_priorities=True,
)
SPEC: dict[str, Any] = {
    "process": {"args": [], "env": [], "user": {}},
    "mounts": [],
    "linux": {"cgroupsPath": "pods.slice:cri:c1", "namespaces": [{"type": "network"}, {"type": "ipc"}]},
}


def bind(destination: str, *options: str, source: str = "/s") -> dict[str, Any]:
    return {destination: {"destination": destination, "type": "bind", "source": source, "options": ["bind", *options]}}


def limits(**resources: Any) -> dict[str, Any]:
    return {"resources": resources}


IO = {"io_priority": {"class": "IOPRIO_CLASS_BE", "priority": 7}}
SCHEDULER = {"scheduler": {"policy": "SCHED_FIFO"}}
ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}
NOTIFY = {**ALLOW, "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}

# What is asked, of which host and runtime; the field, its key, and a part of the reason.
REFUSED: list[tuple[dict[str, Any], HostFacts, RuntimeFacts, str, str, str]] = [
    ({"unsupported": {"RdtClass": "no class gold"}}, HOST, ABLE, "RdtClass", "", "no class gold"),
    (limits(memory={"kernel": 1}), V1, ABLE, "MemKernelLimit", "", "ignore"),
    (limits(memory={"useHierarchy": False}), V1, ABLE, "MemUseHierarchy", "", "always"),
    (limits(memory={"swappiness": 0}), HOST, ABLE, "MemSwappiness", "", "version 2"),
    (limits(memory={"disableOOMKiller": True}), HOST, ABLE, "MemDisableOomKiller", "", "version 2"),
    (limits(memory={"kernelTCP": 1}), HOST, ABLE, "MemTCPLimit", "", "version 2"),
    (limits(cpu={"realtimeRuntime": 1}), HOST, ABLE, "CPURealtimeRuntime", "", "version 2"),
    (limits(cpu={"realtimePeriod": 1}), HOST, ABLE, "CPURealtimePeriod", "", "version 2"),
    (limits(unified={"memory.high": "1"}), V1, ABLE, "CgroupsUnified", "memory.high", "version 1"),
    (limits(memory={"swap": 9}), dataclasses.replace(V1, swap_accounting=False), ABLE, "MemSwapLimit", "", "swap"),
    (limits(hugepageLimits=[{"pageSize": "1GB", "limit": 0}]), HOST, ABLE, "HugepageLimits", "1GB", "sizes: 2MB"),
    ({"mounts": bind("m")}, HOST, ABLE, "Mounts", "m", "must be absolute"),
    ({"mounts": bind("/m", source="s")}, HOST, ABLE, "Mounts", "/m", "source 's'"),
    ({"mounts": bind("/m", "relabel")}, HOST, ABLE, "Mounts", "/m", "relabel"),
    ({"mounts": bind("/m", "ridmap")}, HOST, ABLE, "Mounts", "/m", "option ridmap"),
    ({"mounts": bind("/m", "rro")}, HOST, RuntimeFacts(), "Mounts", "/m", "option rro"),
    ({"oom_score_adj": 1001}, HOST, ABLE, "OomScoreAdj", "", "between"),
    ({"oom_score_adj": -501}, HOST, ABLE, "OomScoreAdj", "", "less than -500"),
    (IO, HOST, RuntimeFacts(), "IoPriority", "", "version 1.1"),
    (SCHEDULER, HOST, RuntimeFacts(), "LinuxSched", "", "version 1.1"),
    ({"io_priority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}, HOST, ABLE, "IoPriority", "", "between 0 and 7"),
    ({"rlimits": ({"type": "NOFILE", "soft": 1, "hard": 1},)}, HOST, ABLE, "Rlimits", "NOFILE", "RLIMIT_NOFILE"),
    ({"rlimits": ({"type": "RLIMIT_AS", "soft": 2, "hard": 1},)}, HOST, ABLE, "Rlimits", "RLIMIT_AS", "exceeds"),
    ({"hooks": (("poststop", {"path": "/h"}),)}, HOST, ABLE, "OciHooks", "", "no poststop hooks"),
    ({"hooks": (("prestart", {"path": "h"}),)}, HOST, ABLE, "OciHooks", "", "absolute path"),
    ({"devices": {"d": {"path": "d", "type": "c"}}}, HOST, ABLE, "Devices", "d", "must be absolute"),
    ({"devices": {"/d": {"path": "/d", "type": "x"}}}, HOST, ABLE, "Devices", "/d", "none of b, c, u and p"),
    ({"namespaces": {"time": ""}}, HOST, ABLE, "Namespace", "time", "no such namespace"),
    ({"namespaces": {"uts": "n"}}, HOST, ABLE, "Namespace", "uts", "must be absolute"),
    ({"sysctls": {"vm.swappiness": "1"}}, HOST, ABLE, "Sysctl", "vm.swappiness", "of the whole node"),
    ({"sysctls": {"kernel.hostname": "1"}}, HOST, ABLE, "Sysctl", "kernel.hostname", "uts namespace"),
    (
        {"sysctls": {"net.x": "1"}, "namespaces": {"network": None}},
        HOST,
        ABLE,
        "Sysctl",
        "net.x",
        "the node's network namespace",
    ),
    (
        {"net_devices": {"e": {}}, "namespaces": {"network": None}},
        HOST,
        ABLE,
        "LinuxNetDevices",
        "e",
        "the node's network namespace",
    ),
    ({"net_devices": {"e": {}}}, HOST, RuntimeFacts(), "LinuxNetDevices", "e", "cannot move"),
    ({"memory_policy": {"mode": "MPOL_LOCAL"}}, HOST, ABLE, "MemoryPolicy", "", "MPOL_LOCAL"),
    ({"rdt": {"closID": "a"}}, dataclasses.replace(HOST, resctrl=False), ABLE, "RdtClosID", "", "/sys/fs/resctrl"),
    ({"rdt": {"closID": "a"}}, HOST, RuntimeFacts(), "RdtClosID", "", "closID"),
    ({"rdt": {"schemata": ["L3"]}}, HOST, RuntimeFacts(rdt=True), "RdtSchemata", "", "schemata"),
    ({"rdt": {"enableMonitoring": True}}, HOST, RuntimeFacts(rdt=True), "RdtEnableMonitoring", "", "Monitoring"),
    ({"seccomp": ALLOW}, HOST, RuntimeFacts(seccomp=False), "SeccompPolicy", "", "without seccomp"),
    ({"seccomp": NOTIFY}, HOST, ABLE, "SeccompPolicy", "", "SCMP_ACT_NOTIFY"),
    *(
        ({"cgroups_path": path}, HOST, ABLE, "CgroupsPath", "", "SLICE:cri:c1, as pods.slice:cri:c1")
        for path in (
            "/pods/c1",
            "pods.slice:cri:other",
            "pods.slice:other:c1",
            "pods.slice:c1",
            "pods.slice:cri:c1:",
            ":cri:c1",
            "pods:cri:c1",
            "/pods.slice:cri:c1",
            "a--b.slice:cri:c1",
            "-.slice:cri:c1",
        )
    ),
]


@pytest.mark.parametrize(("asked", "host", "runtime", "field", "key", "reason"), REFUSED)
def test_what_cannot_be_had_is_refused_by_plugin_and_field(
    asked: dict[str, Any], host: HostFacts, runtime: RuntimeFacts, field: str, key: str, reason: str
) -> None:
    adjustment = SpecAdjustment(container_id="c1", owners={(field, key): "tuner"}, **asked)
    with pytest.raises(FailedPreconditionError) as caught:
        adjust(SPEC, adjustment, host, runtime)
    what = f"{field} '{key}'" if key else field
    assert str(caught.value).startswith(f"NRI plugin tuner adjusts {what} of container c1: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("/other/pods/c1", True),
        ("/pods/c1/c1", True),
        ("/other/c2", False),
        ("/c1", False),
        ("c1", False),
        ("other/c1", False),
        ("/other/../c1", False),
        ("/other//c1", False),
        ("/other/c1/", False),
        ("/other\0/c1", False),
        ("/other\n/c1", False),
        ("/./c1", False),
        ("//other/c1", False),
        ("pods.slice:cri:c1", False),
    ],
)
def test_a_cgroup_may_have_another_parent_but_no_other_name(path: str, fits: bool) -> None:
    spec = {**SPEC, "linux": {**SPEC["linux"], "cgroupsPath": "/pods/c1"}}
    adjustment = SpecAdjustment(container_id="c1", cgroups_path=path, owners={("CgroupsPath", ""): "tuner"})
    if fits:
        assert adjust(spec, adjustment, HOST, ABLE)["linux"]["cgroupsPath"] == path
    else:
        with pytest.raises(FailedPreconditionError, match=r"tuner .* of the form /PARENT/c1, as /pods/c1 is"):
            adjust(spec, adjustment, HOST, ABLE)


@pytest.mark.parametrize(
    ("asked", "host", "runtime"),
    [
        ({"mounts": bind("/m", "rro", "nosuid", "ro")}, HOST, ABLE),
        ({"mounts": bind("/m", source="/s") | {"relative": None}}, HOST, ABLE),
        ({"oom_score_adj": -500}, HOST, ABLE),
        (IO | SCHEDULER, HOST, ABLE),
        ({"hooks": (("poststop", {"path": "/h"}),)}, HOST, RuntimeFacts()),
        ({"namespaces": {"time": None, "uts": "/n"}}, HOST, ABLE),
        ({"namespaces": {"time": ""}}, HOST, RuntimeFacts()),
        ({"sysctls": {"net.x": "1", "net/y": "1", "kernel.shmmax": "1", "fs.mqueue.x": "1", "vm.x": None}}, HOST, ABLE),
        ({"sysctls": {"kernel.domainname": "a"}, "namespaces": {"uts": ""}}, HOST, ABLE),
        ({"net_devices": {"e": None}}, HOST, RuntimeFacts()),
        ({"rdt_removed": True}, dataclasses.replace(HOST, resctrl=False), RuntimeFacts()),
        ({"seccomp": NOTIFY}, HOST, RuntimeFacts()),
        ({"cgroups_path": "other-pods.slice:cri:c1"}, HOST, ABLE),
        (limits(memory={"disableOOMKiller": False}), HOST, ABLE),
        (limits(memory={"swappiness": 0, "disableOOMKiller": True, "kernelTCP": 1}), V1, ABLE),
        (limits(cpu={"realtimeRuntime": 1, "realtimePeriod": 1}), V1, ABLE),
        (limits(unified={"memory.high": "1"}, memory={"swap": 9}), HOST, ABLE),
        (limits(hugepageLimits=[{"pageSize": "2MB", "limit": 0}]), HOST, ABLE),
    ],
)
def test_what_can_be_had_is_given(asked: dict[str, Any], host: HostFacts, runtime: RuntimeFacts) -> None:
    adjust(SPEC, SpecAdjustment(**asked), host, runtime)


def test_an_update_has_the_same_faults() -> None:
    (fault,) = resource_faults({"cpu": {"realtimePeriod": 1}, "memory": {"limit": 5}}, HOST)
    assert (fault.field, fault.key) == ("CPURealtimePeriod", "")


RUNC_1_1 = {
    "ociVersionMax": "1.0.2-dev",
    "hooks": ["prestart"],
    "mountOptions": ["rro"],
    "linux": {"namespaces": ["pid"], "seccomp": {"enabled": True, "actions": ["SCMP_ACT_LOG"]}},
}
RUNC_1_4 = {
    "ociVersionMax": "1.3.0",
    "linux": {
        "seccomp": {"enabled": False},
        "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
        "memoryPolicy": {"modes": ["MPOL_BIND"]},
        "netDevices": {"enabled": True},
    },
}


@pytest.mark.parametrize(
    ("report", "facts"),
    [
        (None, RuntimeFacts()),
        ({}, RuntimeFacts()),
        ({"linux": None, "hooks": "x", "ociVersionMax": 7}, RuntimeFacts()),
        (
            RUNC_1_1,
            RuntimeFacts(
                hooks=frozenset({"prestart"}),
                namespaces=frozenset({"pid"}),
                mount_options=frozenset({"rro"}),
                seccomp_actions=frozenset({"SCMP_ACT_LOG"}),
            ),
        ),
        (
            RUNC_1_4,
            RuntimeFacts(
                seccomp=False,
                rdt=True,
                rdt_schemata=True,
                rdt_monitoring=True,
                net_devices=True,
                memory_policies=frozenset({"MPOL_BIND"}),
                process_priorities=True,
            ),
        ),
        ({"ociVersionMax": "1.1.0+dev"}, RuntimeFacts(process_priorities=True)),
        ({"ociVersionMax": "2.0.0"}, RuntimeFacts(process_priorities=True)),
    ],
)
def test_the_report_of_a_runtime(report: dict[str, Any] | None, facts: RuntimeFacts) -> None:
    assert runtime_facts(report) == facts
