"""Plugins of the node (NRI) over the real socket: what they are told, what they change, and how they part."""

from __future__ import annotations

import json
import os
import stat
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.node import Node, limit_of
from tests.support.nri_plugin import TestPlugin, plugged
from tests.support.pods import limited
from tests.support.waiting import eventually


def socket_of(node: Node) -> str:
    return f"{node.base}/nri/nri.sock"


def adjusting(**fields: Any) -> Any:
    """An answer to CreateContainer with this adjustment."""
    return lambda request: nri.CreateContainerResponse(adjust=nri.ContainerAdjustment(**fields))


def failing(times: int = 1) -> Any:
    """An answer that is an error, so many times."""
    left = [times]

    def answer(request: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise ValueError("not today")

    return answer


def spec_of(node: Node, container: str) -> dict[str, Any]:
    with open(f"{node.state}/containers/{container}/config.json") as f:
        spec: dict[str, Any] = json.load(f)
        return spec


def test_every_event_of_a_pod_and_its_container_comes_once_and_in_order(node: Node) -> None:
    with plugged(socket_of(node)) as plugin:
        pod = node.run_pod("events", labels={"a": "b"}, annotations={"c": "d"})
        container = node.run(pod, "c", ["sleep", "1000"], envs=[cri.KeyValue(key="K", value=b"V")])
        node.client.UpdateContainerResources(
            container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        )
        node.client.UpdatePodSandboxResources(
            pod_sandbox_id=pod,
            resources=cri.LinuxContainerResources(cpu_shares=77),
            overhead=cri.LinuxContainerResources(),
        )
        node.client.StopContainer(container_id=container, timeout=0)
        node.client.StopContainer(container_id=container, timeout=0)
        node.client.RemoveContainer(container_id=container)
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert plugin.methods("events") == [
        "RunPodSandbox",
        *("CreateContainer", "ValidateContainerAdjustment", "PostCreateContainer"),
        *("StartContainer", "PostStartContainer"),
        *("UpdateContainer", "PostUpdateContainer", "UpdatePodSandbox", "PostUpdatePodSandbox"),
        *("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"),
    ]
    (told,) = plugin.requests("CreateContainer")
    assert (told.pod.id, told.pod.name, told.pod.namespace, told.pod.uid) == (pod, "events", "e2e", "uid-events")
    assert (told.pod.labels["a"], told.pod.annotations["c"]) == ("b", "d")
    assert len(told.pod.ips) == 1
    assert {n.type for n in told.pod.linux.namespaces} == {"network", "uts", "ipc"}
    assert (told.container.id, told.container.name, told.container.pod_sandbox_id) == (container, "c", pod)
    assert "K=V" in told.container.env
    assert list(told.container.args) == ["sleep", "1000"]
    assert "/proc" in {m.destination for m in told.container.mounts}
    (started,) = plugin.requests("PostStartContainer")
    assert started.container.state == nri.CONTAINER_RUNNING
    assert started.container.pid > 0
    (updated,) = plugin.requests("UpdateContainer")
    assert updated.linux_resources.memory.limit.value == 64 << 20
    (of_pod,) = plugin.requests("UpdatePodSandbox")
    assert of_pod.linux_resources.cpu.shares.value == 77
    (stopped,) = plugin.requests("StopContainer")
    assert (stopped.container.state, stopped.container.exit_code) == (nri.CONTAINER_STOPPED, 137)


def test_a_container_that_ends_by_itself_is_stopped_for_plugins_too(node: Node) -> None:
    with plugged(socket_of(node)) as plugin:
        pod = node.run_pod("exits")
        node.wait(node.run(pod, "c", ["sh", "-c", "exit 3"]))
        eventually(lambda: plugin.requests("StopContainer"))
        assert plugin.requests("StopContainer")[0].container.exit_code == 3


def test_what_plugins_adjust_is_what_the_container_gets(node: Node) -> None:
    first = adjusting(
        env=[nri.KeyValue(key="FROM", value="plugin")],
        annotations={"note": "here"},
        mounts=[nri.Mount(destination="/extra", type="bind", source=node.logs, options=["rbind", "ro"])],
        rlimits=[nri.POSIXRlimit(type="RLIMIT_NOFILE", hard=777, soft=555)],
        linux=nri.LinuxContainerAdjustment(
            resources=nri.LinuxResources(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=96 << 20))),
            oom_score_adj=nri.OptionalInt(value=555),
        ),
    )
    seen: list[Any] = []

    def second(request: Any) -> None:
        seen.append(request)

    with (
        plugged(socket_of(node), "10", "first", CreateContainer=first),
        plugged(socket_of(node), "20", "second", CreateContainer=second),
    ):
        pod = node.run_pod("adjusted")
        container = node.run(pod, "c", ["sleep", "1000"])
    assert "FROM=plugin" in seen[0].container.env, "the second plugin sees what the first has changed"
    printed = node.sh(container, "echo $FROM; ls -d /extra; cat /proc/1/oom_score_adj")
    assert printed.split() == ["plugin", "/extra", "555"]
    with open(f"/proc/{node.pid(container)}/limits") as f:
        (limit,) = [line.split() for line in f if line.startswith("Max open files")]
    assert limit[3:5] == ["555", "777"]
    assert spec_of(node, container)["annotations"]["note"] == "here"
    controller, file = ("memory", "memory.limit_in_bytes") if "memory" in cgroups.roots() else ("", "memory.max")
    assert limit_of(pod, container, controller, file) == str(96 << 20)
    assert node.status(container).resources.linux.memory_limit_in_bytes == 96 << 20
    node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=300))
    assert spec_of(node, container)["linux"]["resources"]["memory"]["limit"] == 96 << 20, "an update keeps it"


@pytest.mark.parametrize("method", ["RunPodSandbox", "CreateContainer", "StartContainer", "UpdateContainer"])
def test_an_error_of_a_plugin_fails_the_call_and_the_retry_works(node: Node, method: str) -> None:
    with plugged(socket_of(node), **{method: failing()}) as plugin:

        def attempt(action: Any) -> Any:
            if action.__name__ == method:
                with pytest.raises(grpc.RpcError, match=f"NRI plugin 10-test fails {method}: not today") as caught:
                    action()
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            return action()

        def RunPodSandbox() -> str:
            return node.run_pod("fails")

        pod = attempt(RunPodSandbox)

        def CreateContainer() -> str:
            return node.create(pod, "c", ["sleep", "1000"])

        container = attempt(CreateContainer)
        if method == "StartContainer":
            with pytest.raises(grpc.RpcError, match="not today"):
                node.client.StartContainer(container_id=container)
            assert node.status(container).reason == "StartError"
        else:
            node.client.StartContainer(container_id=container)
        if method == "UpdateContainer":

            def UpdateContainer() -> None:
                node.client.UpdateContainerResources(
                    container_id=container, linux=cri.LinuxContainerResources(cpu_shares=99)
                )

            attempt(UpdateContainer)
        assert len(node.client.ListPodSandbox().items) == 1
        assert len(node.client.ListContainers().containers) == 1
    if method in ("RunPodSandbox", "CreateContainer"):
        undone = "RemovePodSandbox" if method == "RunPodSandbox" else "RemoveContainer"
        assert undone in plugin.methods(), "what was not made is removed for the plugins too"


def test_stops_and_removals_go_on_whatever_plugins_say(node: Node) -> None:
    methods = ("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox", "PostStartContainer")
    with plugged(socket_of(node), **{method: failing(99) for method in methods}) as plugin:
        pod = node.run_pod("goes")
        node.run(pod, "c", ["sleep", "1000"])
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert set(methods) <= set(plugin.methods())
    assert list(node.client.ListPodSandbox().items) == []


def test_plugins_that_set_the_same_are_refused(node: Node) -> None:
    same = adjusting(env=[nri.KeyValue(key="X", value="1")])
    pod = node.run_pod("conflict")
    with (
        plugged(socket_of(node), "10", "one", CreateContainer=same),
        plugged(socket_of(node), "20", "two", CreateContainer=same),
        pytest.raises(grpc.RpcError, match=r"20-two.*10-one"),
    ):
        node.create(pod, "c")
    assert list(node.client.ListContainers().containers) == []


def test_a_validator_can_reject(node: Node) -> None:
    def rejects(request: Any) -> Any:
        return nri.ValidateContainerAdjustmentResponse(reject=bool(request.adjust.args), reason="no other command")

    pod = node.run_pod("judged")
    with (
        plugged(socket_of(node), "10", "one", CreateContainer=adjusting(args=["true"])),
        plugged(socket_of(node), "90", "judge", ValidateContainerAdjustment=rejects),
        pytest.raises(grpc.RpcError, match=r"90-judge rejects.*no other command"),
    ):
        node.create(pod, "c")


def test_what_this_node_cannot_give_is_an_error_with_the_plugins_name(node: Node) -> None:
    classes = nri.LinuxResources(blockio_class=nri.OptionalString(value="fast"))
    answer = adjusting(linux=nri.LinuxContainerAdjustment(resources=classes))
    with plugged(socket_of(node), CreateContainer=answer):
        pod = node.run_pod("cannot")
        with pytest.raises(grpc.RpcError, match="NRI plugin 10-test adjusts BlockioClass"):
            node.create(pod, "c")


def shares(container: str, value: int) -> nri.ContainerUpdate:
    resources = nri.LinuxResources(cpu=nri.LinuxCPU(shares=nri.OptionalUInt64(value=value)))
    return nri.ContainerUpdate(container_id=container, linux=nri.LinuxContainerUpdate(resources=resources))


def shares_of(node: Node, container: str) -> int:
    value: int = node.status(container).resources.linux.cpu_shares
    return value


def test_a_plugin_moves_the_cgroup_of_a_container(node: Node) -> None:
    def moved(request: Any) -> Any:
        parent, name = os.path.split(request.container.linux.cgroups_path)
        return adjusting(linux=nri.LinuxContainerAdjustment(cgroups_path=f"{parent}/plugin/{name}"))(request)

    with plugged(socket_of(node), CreateContainer=moved):
        pod = node.run_pod("moved")
        container = node.run(pod, "c", ["sleep", "1000"], **limited(memory_limit_in_bytes=64 << 20))
    cgroup = f"/criserver/{pod}/plugin/{container}"
    assert cgroups.processes(cgroup) == [node.pid(container)]
    node.kill()
    node.start()
    stats = node.client.ContainerStats(container_id=container).stats
    assert stats.memory.working_set_bytes.value > 0
    node.client.StopContainer(container_id=container, timeout=0)
    node.client.RemoveContainer(container_id=container)
    assert not cgroups.exists(cgroup)


def test_responses_update_other_containers(node: Node) -> None:
    pod = node.run_pod("others")
    other = node.run(pod, "other", ["sleep", "1000"], **limited(cpu_shares=100))
    with plugged(
        socket_of(node),
        CreateContainer=lambda _: nri.CreateContainerResponse(update=[shares(other, 200)]),
        UpdateContainer=lambda request: nri.UpdateContainerResponse(
            update=[shares(other, 300), shares(request.container.id, 350)]
        ),
        StopContainer=lambda _: nri.StopContainerResponse(update=[shares(other, 400)]),
    ):
        container = node.run(pod, "c", ["sleep", "1000"])
        assert shares_of(node, other) == 200
        node.client.UpdateContainerResources(container_id=container, linux=cri.LinuxContainerResources(cpu_shares=250))
        assert (shares_of(node, other), shares_of(node, container)) == (300, 350)
        node.client.StopContainer(container_id=container, timeout=0)
        eventually(lambda: shares_of(node, other) == 400)


def test_a_plugin_updates_and_evicts_on_its_own(node: Node) -> None:
    pod = node.run_pod("alone")
    one = node.run(pod, "one", ["sleep", "1000"], **limited(cpu_shares=100))
    two = node.run(pod, "two", ["sleep", "1000"])
    with plugged(socket_of(node)) as plugin:
        failed = plugin.update(
            update=[shares(one, 222), shares("nothing", 1)],
            evict=[nri.ContainerEviction(container_id=two, reason="too loud")],
        ).failed
        assert [update.container_id for update in failed] == ["nothing"]
        assert shares_of(node, one) == 222
        assert node.wait(two).exit_code == 137


def test_a_plugin_that_connects_while_containers_are_made_learns_of_each_once(node: Node) -> None:
    pod = node.run_pod("race")
    made: list[str] = []
    stop = threading.Event()

    def make(worker: int) -> None:
        number = 0
        while not stop.is_set():
            made.append(node.create(pod, f"c{worker}-{number}"))
            number += 1

    plugins = []
    with ThreadPoolExecutor(3) as workers:
        work = [workers.submit(make, number) for number in range(3)]
        for number in range(6):
            before = len(made)
            plugin = TestPlugin(socket_of(node), f"{number:02}", "late")
            plugin.start()
            plugins.append(plugin)
            eventually(lambda before=before: len(made) > before + 3)  # type: ignore[misc]
        stop.set()
        for each in work:
            each.result()
    for plugin in plugins:
        synchronized = [c.id for request in plugin.requests("Synchronize") for c in request.containers]
        told = [request.container.id for request in plugin.requests("CreateContainer")]
        assert sorted(synchronized + told) == sorted(made)
        plugin.stop()


def test_a_plugin_that_is_late_is_disconnected(node: Node) -> None:
    """The request timeout of the tests' nodes is five seconds, and so long this takes."""
    gate = threading.Event()

    def wait(request: Any) -> None:
        gate.wait()

    try:
        with plugged(socket_of(node), RunPodSandbox=wait) as plugin:
            node.run_pod("late")
            assert plugin.closed.wait(30)
            gate.set()
        eventually(lambda: "does not answer RunPodSandbox" in node.daemon_log())
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("index", "name", "events", "reason"),
    [
        ("1", "short", 0, "is not two digits"),
        ("10", "a b", 0, "is not of letters"),
        ("10", "unknown", 1 << 20, "subscribes to unknown events"),
    ],
)
def test_a_plugin_that_is_wrong_is_disconnected(node: Node, index: str, name: str, events: int, reason: str) -> None:
    plugin = TestPlugin(socket_of(node), index, name, events)
    try:
        plugin._register = True
        plugin._thread.start()
        eventually(lambda: reason in node.daemon_log())
    finally:
        plugin.stop()


def test_the_socket_is_roots_alone(node: Node) -> None:
    assert stat.S_IMODE(os.stat(f"{node.base}/nri").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(socket_of(node)).st_mode) == 0o600


PLUGIN = """\
#!PYTHON
import asyncio, os, socket, sys
sys.path.insert(0, "ROOT")
from criserver.nri.multiplexer import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.ttrpc import TtrpcClient, TtrpcServer

async def serve():
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=int(os.environ["NRI_PLUGIN_SOCKET"])))
    multiplexer = Multiplexer(reader, writer)
    async def configure(payload):
        with open("OUT", "a") as f:
            f.write(os.environ["NRI_PLUGIN_IDX"] + os.environ["NRI_PLUGIN_NAME"])
            f.write(nri.ConfigureRequest.FromString(payload).config + str(os.getpid()) + "\\n")
        return nri.ConfigureResponse(events=1).SerializeToString()
    async def nothing(payload):
        return b""
    service = "nri.pkg.api.v1alpha1.Plugin"
    handlers = {(service, "Configure"): configure, (service, "Synchronize"): nothing, (service, "Shutdown"): nothing}
    server = asyncio.create_task(TtrpcServer(multiplexer.open(PLUGIN_SERVICE), handlers).serve())
    client = TtrpcClient(multiplexer.open(RUNTIME_SERVICE))
    reading = asyncio.create_task(multiplexer.run())
    request = nri.RegisterPluginRequest(plugin_name="other", plugin_idx="99").SerializeToString()
    await client.call("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin", request)
    await reading

asyncio.run(serve())
"""


def test_plugins_of_the_directory_are_started_and_started_again(node: Node) -> None:
    """The daemon waits for them before it serves. One that ends is started again; they end with the daemon."""
    out, directory = f"{node.base}/nri/told", f"{node.base}/nri/plugins"
    os.makedirs(directory)
    os.makedirs(f"{node.base}/nri/conf.d")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(f"{node.base}/nri/conf.d/mine.conf", "w") as f:
        f.write(" configured ")
    text = textwrap.dedent(PLUGIN).replace("PYTHON", sys.executable).replace("ROOT", root).replace("OUT", out)
    for name, mode in (("05-mine", 0o755), ("wrong", 0o755), ("06-not-executable", 0o644)):
        with open(f"{directory}/{name}", "w") as f:
            f.write(text)
        os.chmod(f"{directory}/{name}", mode)
    node.stop()
    try:
        node.start()
        with open(out) as f:
            (line,) = f.read().splitlines()
        first = int(line.removeprefix("05mine configured "))
        os.kill(first, 9)
        eventually(lambda: len(open(out).read().splitlines()) == 2)  # noqa: SIM115
        with open(out) as f:
            second = int(f.read().splitlines()[1].removeprefix("05mine configured "))
        assert second != first
        assert "wrong" in node.daemon_log()
        node.stop()
        eventually(lambda: not os.path.exists(f"/proc/{second}"))
    finally:
        os.unlink(f"{directory}/05-mine")
        if node.process is None or node.process.poll() is not None:
            node.start()


def test_a_socket_that_cannot_be_made_does_not_stop_the_daemon(node: Node) -> None:
    node.stop()
    os.rename(f"{node.base}/nri", f"{node.base}/nri-kept")
    with open(f"{node.base}/nri", "w"):
        pass
    try:
        node.start()
        assert "the NRI socket cannot be made" in node.daemon_log()
        node.run_pod("without")
    finally:
        node.remove_pods()
        node.stop()
        os.unlink(f"{node.base}/nri")
        os.rename(f"{node.base}/nri-kept", f"{node.base}/nri")
        node.start()


def test_a_plugin_of_a_restarted_daemon_is_told_of_what_is_there(node: Node) -> None:
    pod = node.run_pod("stays")
    runs, ends = node.run(pod, "runs", ["sleep", "1000"]), node.run(pod, "ends", ["true"])
    node.wait(ends)
    node.kill()
    node.start()
    with plugged(socket_of(node)) as plugin:
        (request,) = plugin.requests("Synchronize")
        assert [p.id for p in request.pods] == [pod]
        assert [(c.id, c.state) for c in request.containers] == [(runs, nri.CONTAINER_RUNNING)]
        assert list(request.containers[0].args) == ["sleep", "1000"]
