"""Containers of a handler that is a shim of containerd's kind: containerd-shim-runc-v2, where it is on PATH.

CRISERVER_TEST_SHIM names another one, by its path. All other tests run with a shim where E2E_RUNTIME names it.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import serving
from tests.support.node import Node, processes, refused
from tests.support.pods import limited, shared
from tests.support.streaming_client import Spdy
from tests.support.waiting import eventually

SHIM = os.environ.get("CRISERVER_TEST_SHIM", "")
SLEEP = ["sleep", "1000"]
LEAVING = '[runtimes.leaving]\nshim = "{}"\n'
SUCCESS = {"status": "Success"}


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with the shim for pods of namespaces, which are the default, and for sandbox containers."""
    if not SHIM and shutil.which("containerd-shim-runc-v2") is None:
        pytest.skip("containerd-shim-runc-v2 is not on PATH, and CRISERVER_TEST_SHIM names none")
    program = SHIM or shutil.which("containerd-shim-runc-v2") or ""
    # By another name it is not known as runc's, so it is given signals as a shim of virtual machines is.
    other = tmp_path_factory.mktemp("shims") / "containerd-shim-other-v2"
    other.symlink_to(program)
    hanging = other.with_name("containerd-shim-hanging-v2")
    hanging.write_text('#!/bin/sh\ncase "$*" in *delete) exit 0; esac\nsleep 4321\n')
    hanging.chmod(0o755)
    with serving(
        busybox_archive,
        f'[runtimes.runc]\nshim = "{SHIM or "io.containerd.runc.v2"}"\n'
        f'[runtimes.grouped]\nshim = "{other}"\nsandbox = "container"\n'
        f'[runtimes.hanging]\nshim = "{hanging}"\n' + LEAVING.format(program),
    ) as node:
        yield node


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod()


def shims(node: Node, key: str = "") -> list[int]:
    """The processes of containerd's shims, all or those that were started in a bundle."""
    return [
        pid for pid, words in processes() if "-namespace k8s.io" in words and f"{node.state}/containers/{key}" in words
    ]


def url(node: Node, container: str, *command: str, **wanted: bool) -> str:
    if command:
        found: str = node.client.Exec(container_id=container, cmd=command, **wanted).url
    else:
        found = node.client.Attach(container_id=container, **wanted).url
    return found


def test_a_container_runs_prints_and_ends(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sh", "-c", "echo out; echo err >&2; exit 3"])
    ended = node.wait(container)
    assert (ended.exit_code, ended.reason) == (3, "Error")
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert sorted(node.log(container).splitlines()) == ["err", "out"]
    eventually(lambda: not shims(node))


def test_a_command_that_is_not_there_is_told_by_the_runtime(node: Node, pod: str) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "nowhere", "not found"):
        node.run(pod, "c", ["nowhere"])
    container = node.run(pod, "d", SLEEP)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "nowhere", "not found"):
        node.client.ExecSync(container_id=container, cmd=["nowhere"], timeout=20)


def test_commands_in_a_container(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    result = node.client.ExecSync(container_id=container, cmd=["sh", "-c", "echo o; echo e >&2; exit 7"], timeout=20)
    assert (result.stdout, result.stderr, result.exit_code) == (b"o\n", b"e\n", 7)
    assert len(node.sh(container, "head -c 3000000 /dev/zero")) == 3_000_000
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "timed out"):
        node.client.ExecSync(container_id=container, cmd=["sleep", "1234"], timeout=1)
    eventually(lambda: not [pid for pid, words in processes() if words.startswith("sleep 1234")])


def test_a_command_with_streams(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    address = url(node, container, "sh", "-c", "cat; exit 5", stdin=True, stdout=True)
    client = Spdy(address).open_command("error", "stdin", "stdout")
    client.send("stdin", b"in and out", end=True)
    status = client.finish()
    assert bytes(client.got["stdout"]) == b"in and out"
    assert status["details"]["causes"][0]["message"] == "5"


def test_a_command_on_a_terminal_with_its_size(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    address = url(node, container, "sh", stdin=True, stdout=True, tty=True)
    client = Spdy(address).open_command("error", "stdin", "stdout", "resize")
    client.send("resize", b'{"Width":123,"Height":45}\n')
    client.send("stdin", b"while [ \"$(stty size)\" != '45 123' ]; do sleep 0.05; done; tty; exit 3\n")
    status = client.finish()
    assert b"/dev/pts/" in client.got["stdout"]
    assert status["details"]["causes"][0]["message"] == "3"


def test_attach_reads_and_writes(node: Node, pod: str) -> None:
    container = node.run(
        pod, "c", ["sh", "-c", "while read x; do echo got $x; done; echo over"], stdin=True, stdin_once=True
    )
    client = Spdy(url(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    client.send("stdin", b"one\n", end=True)
    assert client.finish() == SUCCESS
    assert b"got one\nover\n" in client.got["stdout"]
    assert node.wait(container).exit_code == 0


def test_attach_to_a_terminal(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sh"], stdin=True, tty=True)
    client = Spdy(url(node, container, stdin=True, stdout=True, tty=True))
    client.open_command("error", "stdin", "stdout", "resize")
    client.send("resize", b'{"Width":99,"Height":33}\n')
    client.send("stdin", b"while [ \"$(stty size)\" != '33 99' ]; do sleep 0.05; done; echo si''zed; exit\n")
    client.until("stdout", b"sized")
    assert node.wait(container).exit_code == 0


@pytest.mark.parametrize("grace", [0, 20])
def test_a_stop(node: Node, pod: str, grace: int) -> None:
    container = node.run(pod, "c", ["sh", "-c", "trap 'exit 9' TERM; echo ready; while true; do sleep 0.05; done"])
    eventually(lambda: "ready" in node.log(container))
    node.client.StopContainer(container_id=container, timeout=grace)
    assert node.status(container).exit_code == (9 if grace else 137)


def test_limits_and_statistics(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP, **limited(memory_limit_in_bytes=64 << 20))
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    node.client.UpdateContainerResources(container_id=container, linux=limits)
    assert node.status(container).resources.linux.memory_limit_in_bytes == 96 << 20
    stats = node.client.ContainerStats(container_id=container).stats
    assert stats.memory.working_set_bytes.value > 0
    assert stats.memory.available_bytes.value > 64 << 20
    bad = cri.LinuxContainerResources(cpuset_cpus="4000")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "limits"):
        node.client.UpdateContainerResources(container_id=container, linux=bad)


def test_an_oom_kill_is_told(node: Node, pod: str) -> None:
    container = node.run(
        pod, "c", ["sh", "-c", "head -c 200m /dev/zero | tail"], **limited(memory_limit_in_bytes=32 << 20)
    )
    ended = node.wait(container)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


def test_a_killed_daemon_finds_what_has_happened_meanwhile(node: Node, pod: str) -> None:
    script = "i=0; while [ ! -e /stop ]; do i=$((i+1)); echo tick $i; sleep 0.05; done; exit 4"
    names = ("stays", "ends")
    containers = {name: node.run(pod, name, ["sh", "-c", script]) for name in names}
    logs = {name: node.status(container).log_path for name, container in containers.items()}
    rootfs = {name: f"{node.state}/containers/{container}/rootfs" for name, container in containers.items()}
    node.kill()
    seen = Path(logs["stays"]).stat().st_size
    eventually(lambda: Path(logs["stays"]).stat().st_size > seen)
    Path(rootfs["ends"], "stop").touch()
    eventually(lambda: os.path.exists(f"{node.state}/containers/{containers['ends']}/exit.json"))
    node.start()
    assert node.wait(containers["ends"]).exit_code == 4
    assert node.sh(containers["stays"], "echo alive") == "alive\n"
    Path(rootfs["stays"], "stop").touch()
    assert node.wait(containers["stays"]).exit_code == 4
    lines = node.log(containers["stays"]).splitlines()
    assert lines == [f"tick {number}" for number in range(1, len(lines) + 1)]


def test_a_shim_that_is_gone_says_nothing_of_the_end(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    (shim,) = shims(node, container)
    os.kill(shim, signal.SIGKILL)
    node.client.StopContainer(container_id=container, timeout=0)
    assert (node.status(container).exit_code, node.status(container).reason) == (255, "Unknown")
    node.client.RemoveContainer(container_id=container)
    assert shims(node) == []


def test_a_handler_that_is_not_configured_any_more_is_cleaned_up_by_its_shim(node: Node) -> None:
    pod = node.client.RunPodSandbox(config=node.pod(), runtime_handler="leaving").pod_sandbox_id
    node.pods.add(pod)
    container = node.run(pod, "c", SLEEP)
    (shim,) = shims(node, container)
    kept = Path(node.state, "shims/leaving/k8s.io", container)
    assert kept.exists()
    node.kill()
    config = Path(node.config)
    whole = config.read_text()
    config.write_text(whole.partition("[runtimes.")[0] + '[runtimes.runc]\npath = "runc"\n')
    node.start()
    os.kill(shim, signal.SIGKILL)
    node.client.StopContainer(container_id=container, timeout=0)
    node.client.RemoveContainer(container_id=container)
    assert not kept.exists()
    assert shims(node) == []
    node.kill()
    config.write_text(whole)
    node.start()


def test_the_shim_that_holds_the_streams_is_killed(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    (ours,) = [
        pid
        for pid, words in processes()
        if f"in {node.state}/containers/{container}" in words and "-namespace" not in words
    ]
    os.kill(ours, signal.SIGKILL)
    node.client.StopContainer(container_id=container, timeout=0)
    assert (node.status(container).exit_code, node.status(container).reason) == (255, "Unknown")
    node.client.RemoveContainer(container_id=container)
    assert shims(node) == []


def test_containers_of_a_sandbox_container_share_its_shim(node: Node) -> None:
    pod = node.client.RunPodSandbox(config=node.pod(), runtime_handler="grouped").pod_sandbox_id
    node.pods.add(pod)
    containers = [node.run(pod, name, SLEEP) for name in ("a", "b")]
    assert len(shims(node)) == 1
    node.client.StopContainer(container_id=containers[0], timeout=0)
    node.client.RemoveContainer(container_id=containers[0])
    node.kill()
    node.start()
    assert node.sh(containers[1], "echo alive") == "alive\n"
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY


@pytest.mark.parametrize("killed", [False, True])
def test_a_start_that_hangs_ends_with_a_stop(node: Node, killed: bool) -> None:
    pod = node.client.RunPodSandbox(config=node.pod(), runtime_handler="hanging").pod_sandbox_id
    node.pods.add(pod)
    container = node.create(pod, "c", SLEEP)
    with ThreadPoolExecutor(1) as threads:
        start = threads.submit(node.client.StartContainer, container_id=container)
        eventually(lambda: any(words.startswith("sleep 4321") for _, words in processes()))
        if killed:
            node.kill()
            node.start()
        node.client.StopContainer(container_id=container, timeout=0)
        with pytest.raises(grpc.RpcError):
            start.result()
    assert (node.status(container).exit_code, node.status(container).reason) == (128, "StartError")
    eventually(lambda: not any(words.startswith("sleep 4321") for _, words in processes()))


def test_a_pod_that_shares_its_pids(node: Node) -> None:
    pod = node.run_pod(linux=shared(pid=cri.POD))
    container = node.run(pod, "c", SLEEP)
    assert node.sh(container, "cat /proc/1/cmdline").startswith("/infra")


def test_no_checkpoint_is_made(node: Node, pod: str) -> None:
    container = node.run(pod, "c", SLEEP)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "handler runc is a shim"):
        node.client.CheckpointContainer(container_id=container, location=f"{node.base}/archive.tar")
    assert node.sh(container, "echo alive") == "alive\n"
