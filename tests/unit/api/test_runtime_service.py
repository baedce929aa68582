"""Lists of pods and containers with very large annotations, or very many labels."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from criserver.api import stats_views
from criserver.api.runtime_service import RuntimeService
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import Sandbox
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to

MAX = 4 << 20


def pod(name: str, size: int, *, labels: int = 0) -> Sandbox:
    return sandbox(
        name,
        SandboxState.READY,
        cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="n", uid="u"),
            annotations={"a": "x" * size},
            labels={"l": "y" * labels, "name": name},
        ),
    )


@pytest.fixture
def records() -> RecordStore:
    return RecordStore(FakeStore())


def service(records: RecordStore, max_message: int = MAX) -> RuntimeService:
    config = SimpleNamespace(max_send_message_size=max_message, root="/")
    return RuntimeService(cast("Any", SimpleNamespace(records=records, config=config)), "v1")


async def listed(service: RuntimeService) -> tuple[int, dict[str, int]]:
    """The bytes of the list, and the size of each pod's annotations in it."""
    answer = await service.list_pod_sandbox(cri.ListPodSandboxRequest())
    items = cri.ListPodSandboxResponse.FromString(answer).items
    assert [i.labels["name"] for i in items] == [i.id for i in items]
    return len(answer), {i.id: len(i.annotations.get("a", "")) for i in items}


async def test_a_list_leaves_out_the_largest_annotations_to_fit_into_a_message(
    records: RecordStore, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = service(records)
    brought_to(records, pod("small", 10))
    for number in range(10):
        brought_to(records, pod(f"large{number}", 256 << 10))
    _, found = await listed(asked)
    assert (found["small"], sum(found.values())) == (10, 10 + 10 * (256 << 10))
    assert "left out" not in capsys.readouterr().out
    brought_to(records, pod("largest", 1 << 20))
    brought_to(records, pod("next", 512 << 10))
    for _ in range(3):
        size, found = await listed(asked)
        assert size < MAX * 15 / 16
        assert (found["largest"], found["next"], found["small"], found["large0"]) == (0, 512 << 10, 10, 256 << 10)
    assert capsys.readouterr().out.count("left out") == 1
    brought_to(records, pod("more", (768 << 10) + 1))
    size, found = await listed(asked)
    assert size < MAX * 15 / 16
    assert (found["largest"], found["more"], found["next"]) == (0, 0, 512 << 10)
    assert capsys.readouterr().out.count("left out") == 1
    status = await asked.pod_sandbox_status(cri.PodSandboxStatusRequest(pod_sandbox_id="largest"))
    assert len(status.status.annotations["a"]) == 1 << 20


async def test_a_list_is_no_larger_than_a_kubelet_takes_whatever_the_daemon_may_send(records: RecordStore) -> None:
    for number in range(70):
        brought_to(records, pod(str(number), 256 << 10))
    size, found = await listed(service(records, 1 << 30))
    assert 14 << 20 < size < 16 << 20
    assert len(found) == 70


async def test_labels_of_an_ordinary_size_stay_in_lists(records: RecordStore) -> None:
    for number in range(5):
        brought_to(records, pod(str(number), 1 << 20, labels=32 << 10))
    size, found = await listed(service(records))
    assert 5 * (32 << 10) < size < MAX
    assert sum(found.values()) < MAX


async def test_of_very_many_labels_lists_keep_a_kubelets_own(records: RecordStore) -> None:
    for number in range(9):
        labels = {"io.kubernetes.pod.uid": f"u{number}", **{f"l{n}": "y" * 60 for n in range(10_000)}}
        metadata = cri.PodSandboxMetadata(name=str(number), namespace="n", uid="u")
        sent = cri.PodSandboxConfig(metadata=metadata, labels=labels)
        brought_to(records, sandbox(str(number), SandboxState.READY, sent))
    answer = await service(records).list_pod_sandbox(cri.ListPodSandboxRequest())
    assert len(answer) < MAX
    items = cri.ListPodSandboxResponse.FromString(answer).items
    assert [item.labels["io.kubernetes.pod.uid"] for item in items] == [f"u{n}" for n in range(9)]
    assert {len(item.labels) for item in items} == {1, 10_001}


async def test_a_list_of_containers_keeps_short_annotations(records: RecordStore) -> None:
    """A kubelet compares the hash in them with that of the pod. It writes hooks of any length beside it."""
    brought_to(records, owner := pod("p", 0))
    for number in range(6):
        annotations = {"io.kubernetes.container.hash": "abc", "preStop": "x" * (1 << 20)}
        sent = cri.ContainerConfig(metadata=cri.ContainerMetadata(name=str(number)), annotations=annotations)
        brought_to(records, container(str(number), owner, ContainerState.CREATED, sent))
    answer = await service(records).list_containers(cri.ListContainersRequest())
    assert len(answer) < MAX
    found = cri.ListContainersResponse.FromString(answer).containers
    assert {c.annotations["io.kubernetes.container.hash"] for c in found} == {"abc"}
    assert {"preStop" in c.annotations for c in found} == {True, False}


async def test_streamed_lists_are_sent_in_messages_of_a_megabyte(records: RecordStore) -> None:
    asked = service(records)
    for number in range(250):
        brought_to(records, pod(f"small{number:03}", 10))
    for number in range(9):
        brought_to(records, pod(f"very{number}", 300 << 10))
    brought_to(records, pod("zlargest", 3 << 20))
    answers = [a async for a in asked.stream_pod_sandboxes(cri.StreamPodSandboxesRequest())]
    assert sum(len(a.pod_sandboxes) for a in answers) == 260
    assert sorted(len(a.pod_sandboxes) for a in answers)[-2:] == [100, 100]
    large = [a for a in answers if a.ByteSize() > 1 << 20]
    assert [[s.id for s in a.pod_sandboxes] for a in large] == [["zlargest"]]
    assert all(len(s.annotations) == 1 for a in answers for s in a.pod_sandboxes)


async def test_statistics_leave_out_the_largest_annotations_too(
    records: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(_: Any, pods: list[Sandbox]) -> AsyncIterator[cri.PodSandboxStats]:
        for found in pods:
            attributes = cri.PodSandboxAttributes(id=found.id, annotations=found.config.annotations)
            yield cri.PodSandboxStats(attributes=attributes)

    monkeypatch.setattr(stats_views.StatsViews, "sandboxes", measured)
    asked = service(records)
    brought_to(records, pod("small", 10))
    for number in range(5):
        brought_to(records, pod(str(number), (1 << 20) - number))
    answer = await asked.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest())
    stats = cri.ListPodSandboxStatsResponse.FromString(answer).stats
    assert {s.attributes.id for s in stats if s.attributes.annotations} == {"small", "2", "3", "4"}
    answers = [a async for a in asked.stream_pod_sandbox_stats(cri.StreamPodSandboxStatsRequest())]
    assert sum(len(s.attributes.annotations) for a in answers for s in a.pod_sandbox_stats) == 6
    assert max(len(a.pod_sandbox_stats) for a in answers) <= 2
