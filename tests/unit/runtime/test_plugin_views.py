"""Pods and containers as plugins see them: every part of an OCI spec comes back as an adjustment of the same."""

from __future__ import annotations

import dataclasses
from typing import Any

from criserver.nri.spec_values import oci_resources, spec_adjustment
from criserver.oci.spec_inputs import PodFacts
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.plugin_views import (
    asked_resources,
    container_view,
    cri_resources,
    namespace_pins,
    pod_view,
    spec_resources,
)
from tests.support.records import container, sandbox

RESOURCES: dict[str, Any] = {
    "memory": {"limit": 1, "reservation": 2, "swap": 3, "kernel": 4, "kernelTCP": 5, "swappiness": 6},
    "cpu": {
        "shares": 1,
        "quota": -1,
        "period": 3,
        "realtimeRuntime": 4,
        "realtimePeriod": 5,
        "cpus": "0-1",
        "mems": "0",
    },
    "hugepageLimits": [{"pageSize": "2MB", "limit": 7}],
    "unified": {"memory.high": "max"},
    "pids": {"limit": 9},
    "devices": [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
}
SPEC: dict[str, Any] = {
    "annotations": {"of": "spec"},
    "process": {
        "args": ["a", "b"],
        "env": ["K=V"],
        "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
        "oomScoreAdj": 100,
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "scheduler": {"policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
    },
    "mounts": [{"destination": "/a", "type": "bind", "source": "/b", "options": ["ro"]}],
    "hooks": {"createRuntime": [{"path": "/h", "args": ["h"], "env": ["E=1"], "timeout": 2}]},
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 0o600, "uid": 3, "gid": 4}],
        "resources": RESOURCES,
        "cgroupsPath": "/c",
        "sysctl": {"net.x": "1"},
        "netDevices": {"eth9": {"name": "eth0"}},
        "intelRdt": {"closID": "c", "schemata": ["L3:0=f"], "enableMonitoring": True},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/l",
            "listenerMetadata": "m",
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 2,
                    "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
    },
}


def test_resources_are_the_same_in_both_directions() -> None:
    assert oci_resources(spec_resources(RESOURCES)) == RESOURCES


def test_a_container_has_every_part_of_its_spec() -> None:
    record = dataclasses.replace(container("c", sandbox("p"), ContainerState.RUNNING), pid=7, started_at=8)
    view = container_view(record, SPEC, "sha256:d")
    assert (view.id, view.pod_sandbox_id, view.state, view.pid) == ("c", "p", nri.CONTAINER_RUNNING, 7)
    assert (list(view.args), list(view.env), view.annotations["of"]) == (["a", "b"], ["K=V"], "spec")
    assert (view.user.uid, view.user.gid, list(view.user.additional_gids)) == (1, 2, [3])
    assert [(n.type, n.path) for n in view.linux.namespaces] == [("pid", ""), ("network", "/n")]
    assert view.image.digest == "sha256:d"
    # What a plugin would ask for with the same values is what the spec has.
    linux, shown = SPEC["linux"], view.linux
    same = spec_adjustment(
        "c",
        nri.ContainerAdjustment(
            mounts=view.mounts,
            hooks=view.hooks,
            rlimits=view.rlimits,
            linux=nri.LinuxContainerAdjustment(
                devices=shown.devices,
                resources=shown.resources,
                cgroups_path=shown.cgroups_path,
                oom_score_adj=shown.oom_score_adj,
                io_priority=shown.io_priority,
                seccomp_policy=shown.seccomp_policy,
                sysctl=shown.sysctl,
                net_devices=shown.net_devices,
                scheduler=shown.scheduler,
                rdt=shown.rdt,
            ),
        ),
        nri.OwningPlugins(),
    )
    assert list(same.mounts.values()) == SPEC["mounts"]
    assert same.hooks == (("createRuntime", SPEC["hooks"]["createRuntime"][0]),)
    assert list(same.rlimits) == SPEC["process"]["rlimits"]
    assert list(same.devices.values()) == linux["devices"]
    assert (same.resources, same.cgroups_path, same.seccomp) == (linux["resources"], "/c", linux["seccomp"])
    assert (same.sysctls, same.net_devices, same.rdt) == (linux["sysctl"], linux["netDevices"], linux["intelRdt"])
    process = SPEC["process"]
    assert (same.oom_score_adj, same.io_priority, same.scheduler) == (
        process["oomScoreAdj"],
        process["ioPriority"],
        process["scheduler"],
    )


def test_a_container_without_a_spec_and_one_that_is_made() -> None:
    view = container_view(container("c", sandbox("p"), ContainerState.CREATING), {})
    assert (view.id, list(view.args), view.HasField("user")) == ("c", [], False)


def test_a_pod() -> None:
    sent = cri.PodSandboxConfig(
        linux=cri.LinuxPodSandboxConfig(
            overhead=cri.LinuxContainerResources(cpu_shares=5), resources=cri.LinuxContainerResources(cpu_shares=6)
        )
    )
    record = dataclasses.replace(
        sandbox("p", SandboxState.READY), sent=sent.SerializeToString(), ips=("10.0.0.1",), handler="kata"
    )
    facts = PodFacts("h", "r", "h", "h", "s", "/net", "/ipc", None, None)
    view = pod_view(record, pid=3, cgroups_path="/c", namespaces=namespace_pins(facts))
    assert (view.id, view.pid, list(view.ips), view.runtime_handler) == ("p", 3, ["10.0.0.1"], "kata")
    assert [(n.type, n.path) for n in view.linux.namespaces] == [("network", "/net"), ("ipc", "/ipc")]
    assert (view.linux.pod_overhead.cpu.shares.value, view.linux.pod_resources.cpu.shares.value) == (5, 6)


def test_what_the_kubelet_asks_for_in_both_directions() -> None:
    asked = cri.LinuxContainerResources(
        memory_limit_in_bytes=1,
        memory_swap_limit_in_bytes=2,
        cpu_shares=3,
        cpu_quota=-1,
        cpu_period=5,
        cpuset_cpus="0",
        cpuset_mems="0",
        unified={"a": "b"},
        hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=4)],
    )
    assert cri_resources(asked_resources(asked)) == asked
    assert asked_resources(cri.LinuxContainerResources()) == nri.LinuxResources()
