"""The operations of the matrix: how each is prepared, called, and called again as a kubelet does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from criserver.cli.client import method
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.faults.plugged import with_plugin
from tests.support.imagebuilder import build_image, busybox_image, write_archive
from tests.support.node import Node
from tests.support.waiting import eventually

ADMIN = admin.DESCRIPTOR.services_by_name["AdminService"]
BASE_IMAGE = "localhost/busybox:latest"
IMAGE = "localhost/points:latest"
LAYERS = 2
# Of an exec, and longer than the deadlines of what it waits for.
EXEC_SECONDS = 8


def archives(directory: str) -> tuple[str, str]:
    """Archives of the image that containers use, and of one that is imported and removed."""
    base, own = f"{directory}/busybox.tar", f"{directory}/points.tar"
    write_archive(busybox_image(), base, BASE_IMAGE)
    layers = [{"a/b": b"1", "a/c": b"2"}, {"a/d": b"3"}]
    assert len(layers) == LAYERS
    write_archive(build_image(layers), own, IMAGE)
    return base, own


class Operation(NamedTuple):
    """``prepare`` makes what the call needs and returns its ID. ``call`` is the call, ``again`` the kubelet's retry."""

    name: str
    prepare: Callable[[Node], str]
    call: Callable[[Node, str], object]
    again: Callable[[Node, str], object]


def shared() -> cri.LinuxPodSandboxConfig:
    """Of a pod whose containers share a PID namespace."""
    options = cri.NamespaceOption(pid=cri.POD)
    return cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))


def send(node: Node, archive: str) -> None:
    """Import an archive."""

    def pieces() -> Any:
        with open(archive, "rb") as f:
            while data := f.read(64 << 10):
                yield admin.ImportImageRequest(data=data, name="archive")

    method(node.client.channel, ADMIN, "ImportImage")(pieces(), timeout=60)


def _run(node: Node, **fields: Any) -> str:
    return node.run_pod("pod", **fields)


def run_again(node: Node, **fields: Any) -> None:
    """A kubelet lists pods first: one that is ready stays, one that is not is stopped, and the next attempt is made."""
    listed = [pod for pod in node.client.ListPodSandbox().items if pod.metadata.name == "pod"]
    for pod in listed:
        if pod.state == cri.SANDBOX_READY:
            return
        node.client.StopPodSandbox(pod_sandbox_id=pod.id)
    node.run_pod("pod", attempt=len(listed), **fields)


def _container(node: Node) -> str:
    """A pod with one container that is created."""
    return node.create(node.run_pod("pod"), "c", ["sleep", "1000"])


def _started(node: Node) -> str:
    return node.run(node.run_pod("pod"), "c", ["sleep", "1000"])


def _exited(node: Node) -> str:
    container = _started(node)
    node.client.StopContainer(container_id=container, timeout=0)
    return container


def _create(node: Node, pod: str) -> str:
    return node.create(pod, "c", ["sleep", "1000"])


def _create_again(node: Node, pod: str) -> None:
    if not node.client.ListContainers(filter={"pod_sandbox_id": pod}).containers:
        _create(node, pod)


def _start(node: Node, container: str) -> None:
    node.client.StartContainer(container_id=container)


def _start_again(node: Node, container: str) -> None:
    """A container that runs stays; one that is created is started; in place of one that has ended comes a new one.

    One that cannot be started is one whose failed start is still being ended.
    """
    (listed,) = node.client.ListContainers(filter={"id": container}).containers
    if listed.state == cri.CONTAINER_CREATED and fails(lambda: _start(node, container)):
        eventually(lambda: node.status(container).state == cri.CONTAINER_EXITED)
        listed.state = cri.CONTAINER_EXITED
    if listed.state not in (cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING):
        container = node.run(listed.pod_sandbox_id, "c", ["sleep", "1000"], attempt=1)
    assert node.status(container).state == cri.CONTAINER_RUNNING


def _stop(node: Node, container: str) -> None:
    node.client.StopContainer(container_id=container, timeout=0)
    assert node.status(container).state == cri.CONTAINER_EXITED


def _remove(node: Node, container: str) -> None:
    node.client.RemoveContainer(container_id=container)


def _full(node: Node, linux: cri.LinuxPodSandboxConfig | None = None) -> str:
    """A pod with a container that runs."""
    pod = node.run_pod("pod", linux=linux)
    node.run(pod, "c", ["sleep", "1000"])
    return pod


def _stopped(node: Node) -> str:
    pod = _full(node)
    _stop_pod(node, pod)
    return pod


def _stop_pod(node: Node, pod: str) -> None:
    node.client.StopPodSandbox(pod_sandbox_id=pod)


def _remove_pod(node: Node, pod: str) -> None:
    node.client.RemovePodSandbox(pod_sandbox_id=pod)


def _remove_image(node: Node, _: str) -> None:
    node.client.RemoveImage(image=cri.ImageSpec(image=IMAGE))


def _exec(node: Node, container: str) -> None:
    done = node.client.ExecSync(container_id=container, cmd=["true"], timeout=EXEC_SECONDS)
    assert done.exit_code == 0, done


def _exec_again(node: Node, container: str) -> None:
    """A kubelet starts a container anew whose probes fail."""
    if fails(lambda: _exec(node, container)):
        node.client.StopContainer(container_id=container, timeout=0)
        (listed,) = node.client.ListContainers(filter={"id": container}).containers
        _exec(node, node.run(listed.pod_sandbox_id, "c", ["sleep", "1000"], attempt=1))


def _update(node: Node, container: str) -> None:
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    node.client.UpdateContainerResources(container_id=container, linux=limits)


def operations(archive: str) -> list[Operation]:
    """The operations that every node has; ``archive`` has an image of its own, named IMAGE.

    :mod:`tests.faults.more_operations` has the others.
    """

    def nothing(_: Node) -> str:
        return ""

    def load(node: Node, _: str = "") -> str:
        send(node, archive)
        return ""

    plain = [
        Operation("RunPodSandbox", nothing, lambda node, _: _run(node), lambda node, _: run_again(node)),
        Operation(
            "RunPodSandbox, shared PIDs",
            nothing,
            lambda node, _: _run(node, linux=shared()),
            lambda node, _: run_again(node, linux=shared()),
        ),
        Operation("CreateContainer", lambda node: node.run_pod("pod"), _create, _create_again),
        Operation("StartContainer", _container, _start, _start_again),
        Operation("StopContainer", _started, _stop, _stop),
        Operation("RemoveContainer", _exited, _remove, _remove),
        Operation("StopPodSandbox", _full, _stop_pod, _stop_pod),
        Operation("StopPodSandbox, shared PIDs", lambda node: _full(node, shared()), _stop_pod, _stop_pod),
        Operation("RemovePodSandbox", _stopped, _remove_pod, _remove_pod),
        Operation("ImportImage", nothing, load, load),
        Operation("RemoveImage", load, _remove_image, _remove_image),
        Operation("ExecSync", _started, _exec, _exec_again),
        Operation("UpdateContainerResources", _started, _update, _update),
    ]
    told = [found for found in plain if not any(word in found.name for word in ("Image", "shared", "Exec"))]
    return plain + [with_plugin(found) for found in told]


def fails(call: Callable[[], object]) -> str:
    """What a call fails with; "" if it succeeds."""
    try:
        call()
    except grpc.RpcError as e:
        return f"{e.code().name}: {e.details()}"
    except AssertionError as e:
        return f"assertion: {e}"
    return ""
