"""The adjustments of several plugins: each field set, removed, replaced, shown to the next plugin, and in conflict."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf import json_format

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.nri.adjustments import ContainerAdjustments
from criserver.nri.ownership import Field
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

CONTAINER = {
    "id": "c1",
    "name": "web",
    "annotations": {"old": "1"},
    "env": ["OLD=1", "PATH=/bin"],
    "args": ["sleep", "1"],
    "mounts": [{"destination": "/old", "source": "/src", "type": "bind", "options": ["rbind"]}],
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 5}],
    "linux": {
        "devices": [{"path": "/dev/old", "type": "c", "major": 1, "minor": 3}],
        "namespaces": [{"type": "network", "path": "/n"}, {"type": "pid"}],
        "sysctl": {"net.old": "1"},
        "net_devices": {"eth7": {"name": "old"}},
        "resources": {"memory": {"limit": {"value": 100}}, "hugepage_limits": [{"page_size": "2MB", "limit": 1}]},
    },
}


def adjustments() -> ContainerAdjustments:
    container = json_format.ParseDict(CONTAINER, nri.Container())
    return ContainerAdjustments(nri.CreateContainerRequest(pod=nri.PodSandbox(id="p1"), container=container))


def response(adjust: dict[str, Any]) -> nri.CreateContainerResponse:
    return json_format.ParseDict({"adjust": adjust}, nri.CreateContainerResponse())


def plain(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def linux(name: str, value: Any) -> dict[str, Any]:
    return {"linux": {name: value}}


def limits(name: str, value: Any) -> dict[str, Any]:
    return {"linux": {"resources": {name: value}}}


# What a plugin sets, and the field and key that it then owns.
SET: list[tuple[dict[str, Any], str, str]] = [
    ({"annotations": {"a": "1"}}, "Annotations", "a"),
    ({"mounts": [{"destination": "/m", "source": "/s", "type": "bind"}]}, "Mounts", "/m"),
    ({"env": [{"key": "E", "value": "1"}]}, "Env", "E"),
    ({"args": ["run"]}, "Args", ""),
    ({"rlimits": [{"type": "RLIMIT_NOFILE", "hard": 7, "soft": 7}]}, "Rlimits", "RLIMIT_NOFILE"),
    ({"CDI_devices": [{"name": "v.com/gpu=0"}]}, "CdiDevices", "v.com/gpu=0"),
    (linux("devices", [{"path": "/dev/x", "type": "c"}]), "Devices", "/dev/x"),
    (linux("cgroups_path", "/p/c"), "CgroupsPath", ""),
    (linux("oom_score_adj", {"value": 0}), "OomScoreAdj", ""),
    (linux("io_priority", {"class": "IOPRIO_CLASS_BE", "priority": 3}), "IoPriority", ""),
    (linux("seccomp_policy", {"default_action": "SCMP_ACT_ALLOW"}), "SeccompPolicy", ""),
    (linux("namespaces", [{"type": "network", "path": "/x"}]), "Namespace", "network"),
    (linux("sysctl", {"net.x": "1"}), "Sysctl", "net.x"),
    (linux("net_devices", {"eth1": {"name": "a"}}), "LinuxNetDevices", "eth1"),
    (linux("scheduler", {"policy": "SCHED_FIFO", "priority": 1}), "LinuxSched", ""),
    (linux("rdt", {"clos_id": {"value": "gold"}}), "RdtClosID", ""),
    (linux("rdt", {"schemata": {"value": ["L3:0=f"]}}), "RdtSchemata", ""),
    (linux("rdt", {"enable_monitoring": {"value": True}}), "RdtEnableMonitoring", ""),
    (linux("memory_policy", {"mode": "MPOL_BIND", "nodes": "0"}), "MemoryPolicy", ""),
    (limits("memory", {"limit": {"value": "0"}}), "MemLimit", ""),
    (limits("memory", {"reservation": {"value": "1"}}), "MemReservation", ""),
    (limits("memory", {"swap": {"value": "1"}}), "MemSwapLimit", ""),
    (limits("memory", {"kernel": {"value": "1"}}), "MemKernelLimit", ""),
    (limits("memory", {"kernel_tcp": {"value": "1"}}), "MemTCPLimit", ""),
    (limits("memory", {"swappiness": {"value": "1"}}), "MemSwappiness", ""),
    (limits("memory", {"disable_oom_killer": {"value": True}}), "MemDisableOomKiller", ""),
    (limits("memory", {"use_hierarchy": {"value": True}}), "MemUseHierarchy", ""),
    (limits("cpu", {"shares": {"value": "2"}}), "CPUShares", ""),
    (limits("cpu", {"quota": {"value": "2"}}), "CPUQuota", ""),
    (limits("cpu", {"period": {"value": "2"}}), "CPUPeriod", ""),
    (limits("cpu", {"realtime_runtime": {"value": "2"}}), "CPURealtimeRuntime", ""),
    (limits("cpu", {"realtime_period": {"value": "2"}}), "CPURealtimePeriod", ""),
    (limits("cpu", {"cpus": "0"}), "CPUSetCPUs", ""),
    (limits("cpu", {"mems": "0"}), "CPUSetMems", ""),
    (limits("pids", {"limit": "-1"}), "PidsLimit", ""),
    (limits("hugepage_limits", [{"page_size": "2MB", "limit": "4"}]), "HugepageLimits", "2MB"),
    (limits("blockio_class", {"value": "slow"}), "BlockioClass", ""),
    (limits("rdt_class", {"value": "gold"}), "RdtClass", ""),
    (limits("unified", {"memory.high": "1"}), "CgroupsUnified", "memory.high"),
]
IDS = [name for _, name, _ in SET]


def test_the_table_has_every_field_of_the_interface() -> None:
    assert {*IDS, "OciHooks", "NoField"} == set(Field.keys())


@pytest.mark.parametrize(("adjust", "field", "key"), SET, ids=IDS)
def test_a_field_is_taken_and_owned(adjust: dict[str, Any], field: str, key: str) -> None:
    merged = adjustments()
    merged.add("one", response(adjust))
    assert plain(merged.adjustment) == plain(response(adjust).adjust)
    assert merged.ownership.owner("c1", getattr(Field, field), key) == "one"


@pytest.mark.parametrize(("adjust", "field", "key"), SET, ids=IDS)
def test_two_plugins_may_not_set_a_field(adjust: dict[str, Any], field: str, key: str) -> None:
    merged = adjustments()
    merged.add("one", response(adjust))
    with pytest.raises(FailedPreconditionError) as caught:
        merged.add("two", response(adjust))
    text = str(caught.value)
    assert "plugin one" in text
    assert "plugin two" in text
    assert field in text
    assert key in text
    assert "c1" in text


@pytest.mark.parametrize(("adjust", "field", "key"), SET, ids=IDS)
def test_the_next_plugin_sees_the_field(adjust: dict[str, Any], field: str, key: str) -> None:
    merged = adjustments()
    merged.add("one", response(adjust))
    shown = plain(merged.request.container)
    if field == "MemoryPolicy":  # no field of a container
        assert shown == plain(adjustments().request.container)
        return
    if field == "Env":
        assert shown["env"] == ["OLD=1", "PATH=/bin", "E=1"]
        return
    assert shown != plain(adjustments().request.container)
    assert_within(plain(response(adjust).adjust), shown)


def assert_within(part: Any, whole: Any) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    elif isinstance(part, list) and part and isinstance(part[0], dict):
        assert all(item in whole for item in part)
    else:
        assert part == whole


REPLACED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"annotations": {"a": "1"}}, {"annotations": {"-a": "", "a": "2"}}, {"annotations": {"a": "2"}}),
    (
        {"mounts": [{"destination": "/m", "source": "/1"}]},
        {"mounts": [{"destination": "-/m"}, {"destination": "/m/", "source": "/2"}]},
        {"mounts": [{"destination": "/m/", "source": "/2"}]},
    ),
    (
        {"env": [{"key": "E", "value": "1"}]},
        {"env": [{"key": "-E"}, {"key": "E", "value": "2"}]},
        {"env": [{"key": "E", "value": "2"}]},
    ),
    ({"args": ["one"]}, {"args": ["", "two"]}, {"args": ["two"]}),
    (
        linux("devices", [{"path": "/dev/x", "type": "c"}]),
        linux("devices", [{"path": "-/dev/x"}, {"path": "/dev/x", "type": "b"}]),
        linux("devices", [{"path": "/dev/x", "type": "b"}]),
    ),
    (linux("sysctl", {"net.x": "1"}), linux("sysctl", {"-net.x": "", "net.x": "2"}), linux("sysctl", {"net.x": "2"})),
    (
        linux("net_devices", {"e": {"name": "1"}}),
        linux("net_devices", {"-e": {}, "e": {"name": "2"}}),
        linux("net_devices", {"e": {"name": "2"}}),
    ),
    (
        linux("rdt", {"clos_id": {"value": "1"}}),
        linux("rdt", {"remove": True, "clos_id": {"value": "2"}}),
        linux("rdt", {"remove": True, "clos_id": {"value": "2"}}),
    ),
]


@pytest.mark.parametrize(("first", "second", "expected"), REPLACED)
def test_a_plugin_that_removes_a_value_first_may_set_it(
    first: dict[str, Any], second: dict[str, Any], expected: dict[str, Any]
) -> None:
    merged = adjustments()
    merged.add("one", response(first))
    merged.add("two", response(second))
    assert plain(merged.adjustment) == expected
    with pytest.raises(FailedPreconditionError, match="plugin two"):
        merged.add("three", response(first))


# What the first plugin sets and the second removes, what is asked for at last, and what stays of the container.
REMOVED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"annotations": {"old": "2"}}, {"annotations": {"-old": ""}}),
    ({"mounts": [{"destination": "/old", "source": "/2"}]}, {"mounts": [{"destination": "-/old"}]}),
    ({"env": [{"key": "OLD", "value": "2"}]}, {"env": [{"key": "-OLD"}]}),
    (linux("devices", [{"path": "/dev/old"}]), linux("devices", [{"path": "-/dev/old"}])),
    (linux("sysctl", {"net.old": "2"}), linux("sysctl", {"-net.old": ""})),
    (linux("net_devices", {"eth7": {"name": "2"}}), linux("net_devices", {"-eth7": {}})),
]


@pytest.mark.parametrize(("first", "second"), REMOVED)
def test_a_plugin_removes_what_another_has_set(first: dict[str, Any], second: dict[str, Any]) -> None:
    merged = adjustments()
    merged.add("one", response(first))
    merged.add("two", response(second))
    assert_removed(merged, second)
    with pytest.raises(FailedPreconditionError, match="which plugin two has removed"):
        merged.add("three", response(first))


@pytest.mark.parametrize(("first", "second"), REMOVED)
def test_a_plugin_removes_what_the_container_has_and_another_may_set_it(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    merged = adjustments()
    merged.add("one", response(second))
    assert_removed(merged, second)
    merged.add("two", response(first))
    assert plain(merged.adjustment) == plain(response(first).adjust)  # without a mark of the removal


def assert_removed(merged: ContainerAdjustments, removal: dict[str, Any]) -> None:
    asked = plain(merged.adjustment)
    (name,) = removal
    if name == "env":
        assert [one["key"] for one in asked["env"]] == ["-OLD"]
        assert merged.request.container.env == ["PATH=/bin"]
        return
    if name == "linux":
        (name,) = removal["linux"]
        asked, shown = asked["linux"][name], plain(merged.request.container.linux).get(name, {})
        assert asked == removal["linux"][name]
    else:
        asked, shown = asked[name], plain(merged.request.container).get(name, {})
        assert asked == removal[name]
    assert "old" not in str(shown)


def test_every_plugin_may_add_hooks() -> None:
    merged = adjustments()
    for plugin in ("one", "two"):
        merged.add(plugin, response({"hooks": {"prestart": [{"path": f"/{plugin}"}], "poststop": [{"path": "/end"}]}}))
    merged.add("three", response({"hooks": {}}))
    assert [hook.path for hook in merged.adjustment.hooks.prestart] == ["/one", "/two"]
    assert [hook.path for hook in merged.request.container.hooks.poststop] == ["/end", "/end"]
    assert merged.ownership.owner("c1", Field.OciHooks) == "one,two"


def test_to_remove_a_namespace_is_a_claim() -> None:
    merged = adjustments()
    merged.add("one", response(linux("namespaces", [{"type": "-network"}])))
    assert [one.type for one in merged.request.container.linux.namespaces] == ["pid"]
    assert [one.type for one in merged.adjustment.linux.namespaces] == ["-network"]
    with pytest.raises(FailedPreconditionError, match="plugin one has set"):
        merged.add("two", response(linux("namespaces", [{"type": "network"}])))


def test_rules_of_the_device_cgroup_add_up() -> None:
    merged = adjustments()
    for plugin in ("one", "two"):
        merged.add(plugin, response(limits("devices", [{"allow": True, "type": "c", "access": "r"}])))
    assert len(merged.adjustment.linux.resources.devices) == 2


def test_rdt_is_removed_with_what_another_plugin_has_set() -> None:
    merged = adjustments()
    merged.add("one", response(linux("rdt", {"clos_id": {"value": "1"}, "schemata": {"value": ["L3:0=1"]}})))
    merged.add("two", response(linux("rdt", {"remove": True})))
    assert plain(merged.adjustment) == linux("rdt", {"remove": True})


def test_a_plugin_that_sets_a_key_twice_is_told_so() -> None:
    twice = {"mounts": [{"destination": "/m"}, {"destination": "/m/"}]}
    with pytest.raises(FailedPreconditionError, match=r"NRI plugin one sets Mounts '/m' of container c1 twice"):
        adjustments().add("one", response(twice))


@pytest.mark.parametrize(
    "adjust",
    [
        {"annotations": {"-": "x"}},
        {"mounts": [{"source": "/s"}]},
        {"env": [{"value": "1"}]},
        {"env": [{"key": "A=B"}]},
        {"args": [""]},
        linux("devices", [{"path": "-"}]),
        linux("namespaces", [{"type": "-"}]),
        linux("namespaces", [{"path": "/x"}]),
        linux("sysctl", {"": "1"}),
    ],
)
def test_what_can_never_be_right_is_refused(adjust: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"NRI plugin one .* container c1"):
        adjustments().add("one", response(adjust))


def test_the_request_stays_as_it_was_for_validators() -> None:
    merged = adjustments()
    merged.add("one", response({"env": [{"key": "E", "value": "1"}]}))
    asked = merged.validation([nri.PluginInstance(name="one", index="00")])
    assert asked.container == adjustments().request.container
    assert asked.pod.id == "p1"
    assert asked.adjust == merged.adjustment
    assert asked.owners.owners["c1"].compound[Field.Env].owners["E"] == "one"
    assert [one.name for one in asked.plugins] == ["one"]


def test_a_plugin_that_adjusts_nothing_costs_no_copy() -> None:
    request = nri.CreateContainerRequest(container=nri.Container(id="c1"))
    merged = ContainerAdjustments(request)
    merged.add("one", nri.CreateContainerResponse())
    assert merged.request is request
    merged.add("two", response({"args": ["other"]}))
    assert list(merged.request.container.args) == ["other"]
    assert not request.container.args


def test_a_response_of_any_size_takes_time_by_its_size() -> None:
    # Minutes, where a list is made anew for each item, or the owners are copied for each update.
    many = response({"rlimits": [{"type": f"{n}"} for n in range(5000)]})
    many.adjust.linux.namespaces.extend(nri.LinuxNamespace(type=f"{n}") for n in range(5000))
    for n in range(5000):
        many.update.add(container_id=f"{n}").linux.resources.cpu.cpus = "0"
    found = adjustments()
    began = time.process_time()
    found.add("10-a", many)
    assert time.process_time() - began < 5
    assert len(found.adjustment.rlimits) == len(found.adjustment.linux.namespaces) == len(found.updates.updates) == 5000


def test_more_sizes_of_huge_pages_than_there_are_is_refused() -> None:
    many = response(limits("hugepage_limits", [{"page_size": f"{n}MB"} for n in range(200)]))
    with pytest.raises(InvalidArgumentError, match="more than 100 sizes"):
        adjustments().add("10-a", many)


def test_updates_of_others_and_evictions_come_along() -> None:
    merged = adjustments()
    answer = nri.CreateContainerResponse(evict=[nri.ContainerEviction(container_id="c3", reason="no room")])
    answer.update.add(container_id="c2").linux.resources.cpu.cpus = "1"
    merged.add("one", answer)
    assert [one.container_id for one in merged.updates.updates] == ["c2"]
    assert [one.reason for one in merged.updates.evictions] == ["no room"]
    assert merged.owners.owners["c2"].simple[Field.CPUSetCPUs] == "one"
    with pytest.raises(InvalidArgumentError, match="during its creation"):
        merged.add("two", nri.CreateContainerResponse(update=[nri.ContainerUpdate(container_id="c1")]))
