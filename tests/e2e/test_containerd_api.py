"""The calls of containerd's API that a kubelet's cAdvisor makes, and the cgroup by which it finds a pod's network.

tests/conformance/test_standalone_kubelet.py has a real kubelet.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from criserver import __version__
from criserver.pb.containerd.v1 import containers_pb2, tasks_pb2, version_pb2
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.fixtures import import_image
from tests.support.node import DRIVER, Node, cgroup, refused
from tests.support.waiting import eventually


class Client:
    """cAdvisor's client, on a socket of the daemon."""

    def __init__(self, path: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{path}")

    def _call(self, service: str, method: str, request: Any, answer: Any) -> Any:
        call: Any = self._channel.unary_unary(
            f"/containerd.services.{service}/{method}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return call(request, timeout=60, metadata=[("containerd-namespace", "k8s.io")], wait_for_ready=True)

    def container(self, key: str) -> containers_pb2.Container:
        request = containers_pb2.GetContainerRequest(id=key)
        return self._call("containers.v1.Containers", "Get", request, containers_pb2.GetContainerResponse).container

    def process(self, key: str) -> tasks_pb2.Process:
        request = tasks_pb2.GetRequest(container_id=key)
        return self._call("tasks.v1.Tasks", "Get", request, tasks_pb2.GetResponse).process

    def version(self) -> str:
        return self._call("version.v1.Version", "Version", Empty(), version_pb2.VersionResponse).version


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    """A daemon that serves on a second socket too."""
    node = Node()
    try:
        with open(node.config) as f:
            text = f.read()
        with open(node.config, "w") as f:
            f.write(text.replace("[grpc]\n", f'[grpc]\ncontainerd_address = "{node.base}/new/containerd.sock"\n'))
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        node.close()


@pytest.fixture
def client(node: Node) -> Client:
    return Client(node.socket)


LABELS = {"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "shop"}


def test_a_container_and_its_process(node: Node, client: Client) -> None:
    pod = node.run_pod(labels=LABELS)
    container = node.create(pod, "c", ["sleep", "1000"], labels={**LABELS, "io.kubernetes.container.name": "c"})
    with refused(grpc.StatusCode.NOT_FOUND, "has no process"):
        client.process(container)
    node.client.StartContainer(container_id=container)
    found = client.container(container)
    assert (found.id, found.sandbox, found.image) == (container, pod, "localhost/busybox:latest")
    assert found.labels == {**LABELS, "io.kubernetes.container.name": "c", "io.cri-containerd.kind": "container"}
    assert found.created_at.ToNanoseconds() == node.status(container).created_at
    assert json.loads(found.spec.value)["process"]["env"] == []
    process = client.process(container)
    assert (process.pid, process.status) == (node.pid(container), tasks_pb2.RUNNING)

    node.client.StopContainer(container_id=container, timeout=0)
    ended = client.process(container)
    assert (ended.status, ended.exit_status) == (tasks_pb2.STOPPED, 137)
    assert ended.exited_at.ToNanoseconds() == node.status(container).finished_at


def test_what_there_is_not(node: Node, client: Client) -> None:
    assert client.version() == __version__
    with refused(grpc.StatusCode.NOT_FOUND):
        client.container("f" * 64)
    pod = node.run_pod()
    with refused(grpc.StatusCode.NOT_FOUND):
        client.container(pod[:10])  # whole IDs only: cAdvisor has them from names of cgroups
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        client._call("containers.v1.Containers", "List", Empty(), Empty)


def test_the_longest_running_container_stands_for_its_pod(node: Node, client: Client) -> None:
    pod = node.run_pod(labels=LABELS)
    own = cgroup(pod, pod)
    assert client.container(pod).labels == {**LABELS, "io.cri-containerd.kind": "sandbox"}
    with refused(grpc.StatusCode.NOT_FOUND):
        client.process(pod)
    first, second = (node.run(pod, name, ["sleep", "1000"]) for name in ("first", "second"))
    assert not cgroups.exists(own), "nobody has asked"

    client.process(second)
    eventually(lambda: cgroups.exists(own))
    assert cgroups.processes(own) == []
    assert client.process(pod).pid == node.pid(first)
    made = inode(own)

    # cAdvisor keeps the process that it was told, so it has to find a new cgroup.
    node.client.StopContainer(container_id=first, timeout=0)
    eventually(lambda: inode(own) not in (made, 0))
    assert client.process(pod).pid == node.pid(second)
    made = inode(own)

    # One that has run for a shorter time does not stand for the pod.
    third = node.run(pod, "third", ["sleep", "1000"])
    client.process(third)
    node.client.StopContainer(container_id=third, timeout=0)
    node.client.RemoveContainer(container_id=third)
    assert (inode(own), client.process(pod).pid) == (made, node.pid(second))

    # It ends while no daemon runs.
    pid = node.pid(second)
    node.kill()
    os.kill(pid, 9)
    node.start()
    eventually(lambda: not cgroups.exists(own))
    with refused(grpc.StatusCode.NOT_FOUND):
        Client(node.socket).process(pod)


@pytest.mark.skipif(DRIVER != "cgroupfs", reason="the cgroup driver is systemd's")
def test_a_daemon_that_was_killed_leaves_no_cgroup_of_an_old_process(node: Node, client: Client) -> None:
    parent = f"/crie2e/cadvisor-{os.getpid()}"
    linux = node.pod().linux
    linux.cgroup_parent = parent
    pod = node.run_pod("kubelets", linux=linux)
    own = f"{parent}/{pod}"
    first, second = (node.run(pod, name, ["sleep", "1000"]) for name in ("first", "second"))
    client.process(first)
    eventually(lambda: cgroups.exists(own))
    made = inode(own)
    node.kill()
    node.start()
    node.client.PodSandboxStatus(pod_sandbox_id=pod)  # waits for the pod's recovery
    assert inode(own) == made, "the process is the same"

    # The old daemon has written that the first one has ended, and has got no further.
    node.client.StopContainer(container_id=first, timeout=0)
    eventually(lambda: inode(own) not in (made, 0))
    made = inode(own)
    node.kill()
    node.start()
    eventually(lambda: inode(own) not in (made, 0))
    assert Client(node.socket).process(pod).pid == node.pid(second)

    node.client.StopContainer(container_id=second, timeout=0)
    eventually(lambda: not cgroups.exists(own))
    cgroups.make_empty(own)
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert not cgroups.exists(own)
    cgroups.remove("/crie2e")


def inode(path: str) -> int:
    """Which cgroup has this path, 0 for none."""
    try:
        return os.stat(cgroups._processes_root() + path).st_ino
    except FileNotFoundError:
        return 0


def test_the_infra_process_of_a_shared_pid_namespace_stands_for_its_pod(node: Node, client: Client) -> None:
    shared = cri.NamespaceOption(pid=cri.POD)
    pod = node.run_pod(
        linux=cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=shared))
    )
    before = client.process(pod).pid
    assert cgroups.processes(cgroup(pod, pod)) == [before]
    container = node.run(
        pod,
        "c",
        ["sleep", "1000"],
        linux=cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=shared)),
    )
    client.process(container)
    node.client.StopContainer(container_id=container, timeout=0)
    assert client.process(pod).pid == before
    assert cgroups.processes(cgroup(pod, pod)) == [before]


def test_a_pod_in_the_nodes_network_has_no_network_of_its_own(node: Node, client: Client) -> None:
    hosts = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
    pod = node.run_pod(
        linux=cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=hosts))
    )
    container = node.run(
        pod,
        "c",
        ["sleep", "1000"],
        linux=cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=hosts)),
    )
    assert client.process(container).pid == node.pid(container)
    with refused(grpc.StatusCode.NOT_FOUND):
        client.process(pod)


@pytest.mark.skipif(shutil.which("containerd") is not None, reason="containerd is installed")
def test_the_second_socket_has_these_calls_alone_and_is_left_to_a_containerd_that_runs(node: Node) -> None:
    path = f"{node.base}/new/containerd.sock"
    second = Client(path)
    assert second.version() == __version__
    assert os.stat(path).st_mode & 0o777 == 0o600
    call: Any = second._channel.unary_unary(
        "/runtime.v1.RuntimeService/Version",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=cri.VersionResponse.FromString,
    )
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        call(cri.VersionRequest(), timeout=60)

    node.stop()
    if os.path.exists(path):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        made = os.stat(path).st_ino
        node.start()
        eventually(lambda: "another process listens there" in node.daemon_log())
        assert os.stat(path).st_ino == made
    os.unlink(path)
