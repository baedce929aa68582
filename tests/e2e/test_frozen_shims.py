"""Ten shims that are stopped, as by a debugger: which calls they delay, and which not.

Nothing but calls that are for the shim itself, which say so after their deadline; ends and removals work without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.freezer import Freezer, freezer
from tests.support.node import Node
from tests.support.streaming_client import Spdy
from tests.support.waiting import eventually, within

__all__ = ["freezer"]

# Seconds. A shim has 10 s to answer (REPLY_TIMEOUT in criserver/runtime/shim_link.py), and 2 s to greet. Runs of the
# OCI runtime are among the calls, on a machine that others use too. So each limit is just below what it excludes:
AT_ONCE = 9.5  # a wait for a shim's answer
DEADLINE = 19.5  # two such waits, one after the other
START = 19.5  # ten waits for greetings, one after the other
SLEEP = ["sleep", "1000"]
SHARED = cri.LinuxPodSandboxConfig(
    security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD))
)


@pytest.fixture
def pods(node: Node) -> list[str]:
    """Two; the containers of the second share a PID namespace, whose infra process has a shim too."""
    return [node.run_pod("one"), node.run_pod("two", linux=SHARED)]


@pytest.fixture
def ten(node: Node, pods: list[str], freezer: Freezer) -> list[str]:
    """Containers whose shims are stopped, one's in the first pod, the others' and the infra process's in the second."""
    containers = [node.run(pods[n > 0], f"frozen{n}", SLEEP) for n in range(9)]
    freezer.freeze(*containers, pods[1])
    assert len(freezer.stopped) == 10
    return containers


def failed(call: Callable[[], object], code: grpc.StatusCode) -> str:
    """The words of a call that comes to its deadline, or another end, without the shim."""
    with within(DEADLINE), pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value
    return str(caught.value.details())


def at_once(*calls: Callable[[], None]) -> None:
    """Make calls side by side; the first that fails is raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def test_no_other_call_is_delayed(node: Node, pods: list[str], ten: list[str]) -> None:
    client = node.client
    for pod in pods:
        with within(AT_ONCE):
            other = node.create(pod, "other", SLEEP)
        with within(AT_ONCE):
            client.StartContainer(container_id=other)
        with within(AT_ONCE):
            assert node.sh(other, "echo hello") == "hello\n"
        with within(AT_ONCE):
            client.ReopenContainerLog(container_id=other)
        with within(AT_ONCE):
            stream = Spdy(client.Exec(container_id=other, cmd=["echo", "hello"], stdout=True).url)
            assert stream.open_command("error", "stdout").finish() == {"status": "Success"}
        with within(AT_ONCE):
            client.StopContainer(container_id=other, timeout=0)
        with within(AT_ONCE):
            client.RemoveContainer(container_id=other)
    with within(AT_ONCE):
        third = node.run_pod("three")
    with within(AT_ONCE):
        client.StopPodSandbox(pod_sandbox_id=third)
        client.RemovePodSandbox(pod_sandbox_id=third)
    with within(AT_ONCE):
        assert len(client.ListContainers().containers) == 9
        assert len(client.ListPodSandbox().items) == 2
        assert len(client.ListContainerStats().stats) == 9
        client.ListPodSandboxStats()
        client.ListPodSandboxMetrics()
        client.Status()
        for pod in pods:
            client.PodSandboxStatus(pod_sandbox_id=pod)
        for container in ten:
            assert node.status(container).state == cri.CONTAINER_RUNNING
            client.ContainerStats(container_id=container)


def test_limits_are_changed_and_urls_are_handed_out_without_the_shim(
    node: Node, pods: list[str], ten: list[str]
) -> None:
    limits = cri.LinuxContainerResources(cpu_shares=512)
    with within(AT_ONCE):
        node.client.UpdateContainerResources(container_id=ten[0], linux=limits)
    assert node.status(ten[0]).resources.linux.cpu_shares == 512
    with within(AT_ONCE):
        node.client.Exec(container_id=ten[0], cmd=["true"], stdout=True)
        node.client.Attach(container_id=ten[0], stdout=True)
        node.client.PortForward(pod_sandbox_id=pods[0])


def test_calls_for_the_shim_itself_are_errors(node: Node, ten: list[str], freezer: Freezer) -> None:
    frozen, late = ten[0], grpc.StatusCode.DEADLINE_EXCEEDED
    words: list[str] = []

    def reopen() -> None:
        words.append(failed(lambda: node.client.ReopenContainerLog(container_id=frozen), late))

    def command() -> None:
        words.append(failed(lambda: node.client.ExecSync(container_id=frozen, cmd=["touch", "/late"]), late))

    def attach() -> None:
        client = Spdy(node.client.Attach(container_id=frozen, stdout=True).url).open_command("error", "stdout")
        with within(DEADLINE):
            words.append(client.finish()["message"])

    at_once(reopen, attach, *[command] * 10)
    asked = sorted(text.partition("did not answer ")[2] for text in words)
    assert asked == ["'attach' within 10 s", *["'exec' within 10 s"] * 10, "'reopen' within 10 s"]
    assert all(frozen in text for text in words)
    # Their connections are in the shim's queue still, which gets full.
    queued = [Spdy(node.client.Exec(container_id=frozen, cmd=["true"], stdout=True).url) for _ in range(10)]
    for client in queued:
        client.open_command("error", "stdout")
    with within(AT_ONCE):
        failed(lambda: node.client.ExecSync(container_id=frozen, cmd=["true"], timeout=1), late)
    full = failed(lambda: node.client.ExecSync(container_id=frozen, cmd=["true"]), late)
    assert f"the shim of container {frozen} accepted no connection within 10 s" in full
    for client in queued:
        client.close()
    freezer.thaw()
    # What nobody waits for any more is not done later.
    assert node.sh(frozen, "sleep 0.5; ls /late 2>/dev/null || echo none") == "none\n"


def test_a_command_has_its_own_deadline_too(node: Node, ten: list[str]) -> None:
    call = lambda: node.client.ExecSync(container_id=ten[0], cmd=["true"], timeout=1)  # noqa: E731
    with within(AT_ONCE):
        assert ten[0] in failed(call, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_container_is_removed(node: Node, ten: list[str], freezer: Freezer) -> None:
    with within(DEADLINE):
        node.client.RemoveContainer(container_id=ten[0])
    assert ten[0] not in {c.id for c in node.client.ListContainers().containers}
    eventually(lambda: not os.path.exists(f"/proc/{freezer.stopped[ten[0]]}"))  # the nursery reaps it


def test_pods_are_stopped_and_removed(node: Node, pods: list[str], ten: list[str], freezer: Freezer) -> None:
    def stop_and_remove() -> None:
        with within(DEADLINE):
            node.client.StopPodSandbox(pod_sandbox_id=pods[0])
        ended = node.status(ten[0])
        assert (ended.state, ended.exit_code) == (cri.CONTAINER_EXITED, 137)
        with within(AT_ONCE):
            node.client.RemovePodSandbox(pod_sandbox_id=pods[0])

    def remove() -> None:
        with within(DEADLINE):
            node.client.RemovePodSandbox(pod_sandbox_id=pods[1])

    at_once(stop_and_remove, remove)
    assert node.settled() == []
    assert freezer.gone()


@pytest.mark.parametrize("call", ["StopContainer", "RemovePodSandbox"])
def test_a_shim_that_stops_before_it_tells_of_the_end(node: Node, freezer: Freezer, call: str) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    pid = node.pid(container)
    shims = freezer.shims(container)
    # Somebody has the container's output open, so that the shim waits for more of it.
    held = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY)
    try:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not os.path.exists(f"/proc/{pid}"))  # it has its status
        eventually(lambda: os.path.exists(f"{node.state}/containers/{container}/exit.json"))
        # It tells 2 s later.
        os.kill(shims[container], signal.SIGSTOP)
        freezer.stopped = shims
        assert node.status(container).state == cri.CONTAINER_RUNNING
        with within(2 * DEADLINE):
            if call == "StopContainer":
                node.client.StopContainer(container_id=container, timeout=0)
                ended = node.status(container)
                assert (ended.state, ended.exit_code) == (cri.CONTAINER_EXITED, 137)
            node.client.RemovePodSandbox(pod_sandbox_id=pod)
    finally:
        os.close(held)
    assert node.settled() == []
    assert freezer.gone()


def test_a_shim_that_stops_while_it_cleans_up_holds_up_no_removal(node: Node, freezer: Freezer) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    freezer.stopped = freezer.shims(container)
    pid = node.pid(container)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    # It has the exit before it is stopped, and has told of it, and is gone itself, or not: all have to be right.
    with contextlib.suppress(ProcessLookupError):
        os.kill(freezer.stopped[container], signal.SIGSTOP)
    with within(2 * DEADLINE):
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert node.settled() == []
    assert freezer.gone()


def test_a_new_daemon_serves_beside_them(node: Node, pods: list[str], ten: list[str], freezer: Freezer) -> None:
    node.kill()
    with within(START):
        node.start()
    with within(AT_ONCE):
        assert {node.status(c).state for c in ten} == {cri.CONTAINER_RUNNING}
        assert {p.state for p in node.client.ListPodSandbox().items} == {cri.SANDBOX_READY}
    with within(AT_ONCE):
        other = node.run(pods[1], "other", SLEEP)
    assert node.sh(other, "echo hello") == "hello\n"
    with within(DEADLINE):
        node.client.StopContainer(container_id=ten[0], timeout=0)
    assert node.status(ten[0]).exit_code == 137
    node.kill()
    node.start()
    assert node.status(ten[0]).exit_code == 137
    # What goes on is as it was: another's end is told with its code.
    freezer.thaw()
    assert node.sh(ten[1], "echo hello") == "hello\n"
    node.client.StopContainer(container_id=ten[1], timeout=0)
    assert node.status(ten[1]).exit_code == 137
    node.kill()
    node.start()
    eventually(lambda: node.sh(ten[2], "echo hello") == "hello\n")


def test_a_daemon_stops_in_order_beside_them(node: Node, ten: list[str]) -> None:
    with within(START):
        assert node.stop() == 0
    node.start()
    assert {node.status(c).state for c in ten} == {cri.CONTAINER_RUNNING}
