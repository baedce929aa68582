"""Container events and streamed lists, which a kubelet with evented PLEG needs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node
from tests.support.pods import shared
from tests.support.waiting import SLOWNESS, eventually

CREATED, STARTED = cri.CONTAINER_CREATED_EVENT, cri.CONTAINER_STARTED_EVENT
STOPPED, DELETED = cri.CONTAINER_STOPPED_EVENT, cri.CONTAINER_DELETED_EVENT
# Seconds. An event comes at once; a test that fails waits for so long.
PATIENCE = 60 * SLOWNESS


class Listener:
    """A listener that the daemon has, and that has been told of nothing yet."""

    def __init__(self, node: Node) -> None:
        self.call = node.client.GetContainerEvents(deadline=300 * SLOWNESS)
        self.events: queue.Queue[cri.ContainerEventResponse] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._wait_until_told(node)

    def _wait_until_told(self, node: Node) -> None:
        """No answer says that the daemon has the call. So pods are made and removed until events of one come."""
        made: list[str] = []

        def told() -> cri.ContainerEventResponse | None:
            made.append(node.run_pod(f"marker-{len(made)}", linux=shared(network=cri.NODE)))
            node.client.RemovePodSandbox(pod_sandbox_id=made[-1])
            with suppress(queue.Empty):
                return self.events.get(timeout=0.2)
            return None

        event = eventually(told)
        assert event is not None
        while (event.container_id, event.container_event_type) != (made[-1], DELETED):
            event = self.next()

    def _run(self) -> None:
        try:
            for event in self.call:
                self.events.put(event)
        except grpc.RpcError:
            return

    def next(self) -> cri.ContainerEventResponse:
        return self.events.get(timeout=PATIENCE)

    def close(self) -> None:
        self.call.cancel()
        self.thread.join()


@pytest.fixture
def listener(node: Node) -> Iterator[Listener]:
    listener = Listener(node)
    yield listener
    listener.close()


def test_a_pods_life_in_events(node: Node, listener: Listener) -> None:
    pod = node.run_pod("told", labels={"a": "b"})
    for kind in (CREATED, STARTED):
        event = listener.next()
        assert (event.container_id, event.container_event_type) == (pod, kind)
        assert event.pod_sandbox_status.state == cri.SANDBOX_READY
        assert event.pod_sandbox_status.labels == {"a": "b"}
        assert event.pod_sandbox_status.network.ip
    container = node.run(pod, "c", ["sh", "-c", "exit 9"])
    states = []
    for kind in (CREATED, STARTED, STOPPED):
        event = listener.next()
        assert (event.container_id, event.container_event_type) == (container, kind)
        assert event.pod_sandbox_status.id == pod
        assert [s.id for s in event.containers_statuses] == [container]
        assert event.created_at > 0
        states.append(event.containers_statuses[0].state)
    assert states == [cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING, cri.CONTAINER_EXITED]
    assert event.containers_statuses[0].exit_code == 9
    assert event.containers_statuses[0] == node.status(container)
    node.client.RemoveContainer(container_id=container)
    event = listener.next()
    assert (event.container_id, event.container_event_type) == (container, DELETED)
    assert list(event.containers_statuses) == []
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    event = listener.next()
    assert (event.container_id, event.container_event_type) == (pod, STOPPED)
    assert event.pod_sandbox_status.state == cri.SANDBOX_NOTREADY
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    event = listener.next()
    assert (event.container_id, event.container_event_type) == (pod, DELETED)
    assert event.pod_sandbox_status.metadata.uid == "uid-told"


@pytest.mark.parametrize("wide", [1, 6])
def test_a_container_that_ends_at_once_is_told_as_started_first(node: Node, listener: Listener, wide: int) -> None:
    """Its shim may send both messages at once. All four events come, in order and once."""
    pod = node.run_pod("brief")
    with ThreadPoolExecutor(wide) as pool:
        containers = list(pool.map(lambda n: node.run(pod, f"c{n}", ["true"]), range(30)))
    for container in containers:
        node.wait(container)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    told: dict[str, list[int]] = {container: [] for container in (pod, *containers)}
    seen: dict[str, list[int]] = {container: [] for container in containers}
    while DELETED not in told[pod]:
        event = listener.next()
        told[event.container_id].append(event.container_event_type)
        for status in event.containers_statuses:
            if status.id == event.container_id:
                seen[status.id].append(status.state)
    everything = [CREATED, STARTED, STOPPED, DELETED]
    assert [c for c, kinds in told.items() if kinds != everything] == []
    states = [cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING, cri.CONTAINER_EXITED]
    assert [c for c, found in seen.items() if found != states] == []


def test_a_start_that_fails_is_told_as_an_end_and_not_as_a_start(node: Node, listener: Listener) -> None:
    pod = node.run_pod("futile")
    container = node.create(pod, "c", ["/no/such/program"])
    with pytest.raises(grpc.RpcError):
        node.client.StartContainer(container_id=container)
    assert node.status(container).reason == "StartError"
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    told = []
    while (event := listener.next()).container_id != pod or event.container_event_type != DELETED:
        if event.container_id == container:
            told.append(event.container_event_type)
    assert told == [CREATED, STOPPED, DELETED]


def test_every_listener_is_told(node: Node, listener: Listener) -> None:
    other = Listener(node)
    try:
        pod = node.run_pod("both")
        while listener.next().container_id != pod:
            pass  # of what the other one was tried with
        assert other.next().container_id == pod
    finally:
        other.close()


def test_streamed_lists_are_the_lists(node: Node) -> None:
    pod = node.run_pod("streamed")
    for n in range(3):
        node.create(pod, f"c{n}", ["true"])
    client = node.client
    streamed = [c for part in client.StreamContainers() for c in part.containers]
    assert streamed == list(client.ListContainers().containers)
    assert len(streamed) == 3
    wanted = cri.ContainerFilter(id=streamed[1].id)
    assert [c for part in client.StreamContainers(filter=wanted) for c in part.containers] == [streamed[1]]
    assert [p for part in client.StreamPodSandboxes() for p in part.pod_sandboxes] == list(
        client.ListPodSandbox().items
    )
    assert [i for part in client.StreamImages() for i in part.images] == list(client.ListImages().images)
