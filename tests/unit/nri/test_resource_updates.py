"""Updates that several plugins ask for: merged for each container, in conflict, ignored, refused."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.nri.resource_updates import ResourceUpdates
from criserver.pb.nri.v1alpha1 import api_pb2 as nri


def update(container_id: str, resources: dict[str, Any], *, ignore: bool = False) -> nri.ContainerUpdate:
    document = {"container_id": container_id, "linux": {"resources": resources}, "ignore_failure": ignore}
    return json_format.ParseDict(document, nri.ContainerUpdate())


def asked() -> nri.UpdateContainerRequest:
    request = nri.UpdateContainerRequest(container=nri.Container(id="c1"))
    request.linux_resources.memory.limit.value = 100
    request.linux_resources.cpu.shares.value = 2
    return request


def test_the_requests_own_resources_are_changed_and_shown() -> None:
    updates = ResourceUpdates(asked())
    updates.add("one", nri.UpdateContainerResponse(update=[update("c1", {"memory": {"limit": {"value": "50"}}})]))
    assert updates.request.linux_resources.memory.limit.value == 50
    assert updates.resources.cpu.shares.value == 2
    assert updates.updates == []


def test_two_plugins_update_different_limits_of_one_container() -> None:
    updates = ResourceUpdates()
    one = update("c2", {"cpu": {"cpus": "0", "quota": {"value": "5"}}, "unified": {"a": "1"}}, ignore=True)
    two = update("c2", {"memory": {"limit": {"value": "0"}}, "unified": {"b": "1"}})
    updates.add("one", nri.StopContainerResponse(update=[one]))
    updates.add("two", nri.StopContainerResponse(update=[two]))
    (merged,) = updates.updates
    assert merged.linux.resources.cpu.quota.value == 5
    assert merged.linux.resources.memory.HasField("limit")
    assert dict(merged.linux.resources.unified) == {"a": "1", "b": "1"}
    assert not merged.ignore_failure


def test_a_value_of_zero_replaces_another() -> None:
    updates = ResourceUpdates(asked())
    updates.add("one", nri.UpdateContainerResponse(update=[update("c1", {"memory": {"limit": {"value": "0"}}})]))
    assert updates.resources.memory.limit.value == 0
    assert updates.resources.memory.HasField("limit")


@pytest.mark.parametrize("container_id", ["c1", "c2"])
def test_a_conflict_names_both_plugins_and_changes_nothing(container_id: str) -> None:
    updates = ResourceUpdates(asked())
    first = update(container_id, {"cpu": {"cpus": "0"}})
    updates.add("one", nri.UpdateContainerResponse(update=[first]))
    before = (
        updates.request,
        updates.updates,
        nri.OwningPlugins.FromString(updates.ownership.message.SerializeToString()),
    )
    second = update(container_id, {"pids": {"limit": "5"}, "cpu": {"cpus": "1"}})
    with pytest.raises(FailedPreconditionError, match=f"plugin two sets CPUSetCPUs of container {container_id}.*one"):
        updates.add("two", nri.UpdateContainerResponse(update=[second]))
    assert (updates.request, updates.updates, updates.ownership.message) == before


def test_an_update_whose_failure_is_ignored_is_left_out_as_a_whole() -> None:
    updates = ResourceUpdates()
    updates.add("one", nri.StopContainerResponse(update=[update("c2", {"cpu": {"cpus": "0"}})]))
    conflict = update("c2", {"pids": {"limit": "5"}, "cpu": {"cpus": "1"}}, ignore=True)
    updates.add("two", nri.StopContainerResponse(update=[conflict, update("c3", {"cpu": {"mems": "0"}})]))
    first, second = updates.updates
    assert (first.linux.resources.cpu.cpus, first.linux.resources.HasField("pids")) == ("0", False)
    assert second.container_id == "c3"
    updates.add("three", nri.StopContainerResponse(update=[update("c2", {"pids": {"limit": "6"}})]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (update("", {}), "without naming it"),
        (update("c2", {"devices": [{"allow": True}]}), "updates the devices of container c2"),
    ],
)
def test_what_can_never_be_right_is_refused(wrong: nri.ContainerUpdate, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ResourceUpdates().add("one", nri.StopContainerResponse(update=[wrong]))


def test_a_container_is_evicted_once() -> None:
    updates = ResourceUpdates()
    for plugin in ("one", "two"):
        eviction = nri.ContainerEviction(container_id="c2", reason=plugin)
        updates.add(plugin, nri.UpdateContainersRequest(evict=[eviction]))
    assert [(one.container_id, one.reason) for one in updates.evictions] == [("c2", "one")]
    with pytest.raises(InvalidArgumentError, match="evicts a container without naming it"):
        updates.add("three", nri.UpdateContainerResponse(evict=[nri.ContainerEviction()]))
