"""crun as a runtime handler beside runc, where it does something else than runc.

CRISERVER_TEST_CRUN names one where the one on PATH does not run on this host. All other tests run with another OCI
runtime than runc where E2E_RUNTIME names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.bundles import Bundles
from tests.support.fixtures import serving
from tests.support.node import Node, refused
from tests.support.pods import shared, userns
from tests.support.streaming_client import Spdy

CRUN = os.environ.get("CRISERVER_TEST_CRUN", "crun")
SHARED = shared(pid=cri.POD)


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    """A node with both; skips where there is no crun, or none that works with this host's cgroups."""
    if shutil.which(CRUN) is None:
        pytest.skip("crun is not on PATH, and CRISERVER_TEST_CRUN names none")
    bundles = Bundles(CRUN)
    try:
        tried = bundles.run(bundles.spec(["true"]))
    finally:
        bundles.close()
    if tried.returncode:
        pytest.skip(f"this crun does not run here: {tried.stderr.strip()}")
    runtimes = f'[runtimes.runc]\npath = "runc"\n[runtimes.crun]\npath = "{CRUN}"\n'
    with serving(busybox_archive, runtimes) as node:
        yield node


def run_pod(node: Node, name: str, linux: cri.LinuxPodSandboxConfig | None = None) -> str:
    config = node.pod(name, linux=linux)
    pod: str = node.client.RunPodSandbox(config=config, runtime_handler="crun").pod_sandbox_id
    node.pods.add(pod)
    return pod


def kept(node: Node, handler: str) -> set[str]:
    """The containers that an OCI runtime knows."""
    try:
        return {name for name in os.listdir(f"{node.state}/runtimes/{handler}") if not name.startswith(".")}
    except FileNotFoundError:
        return set()


def test_a_pods_handler_runs_its_containers(node: Node) -> None:
    pods = {"crun": run_pod(node, "one"), "runc": node.run_pod("two")}
    for handler, pod in pods.items():
        container = node.run(pod, "c", ["sh", "-c", "echo from $0; exit 7", handler])
        assert node.wait(container).exit_code == 7
        assert node.log(container) == f"from {handler}\n"
        running = node.run(pod, "running", ["sleep", "1000"])
        assert kept(node, handler) == {running}
        assert node.sh(running, "echo hello") == "hello\n"
        assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.runtime_handler == (
            "crun" if handler == "crun" else ""
        )


def test_infra_processes_start_each_time(node: Node) -> None:
    """crun's fork that is their parent may outlive it for a moment."""
    for number in range(30):
        pod = run_pod(node, f"pod{number}", SHARED)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)


def test_an_infra_process_in_a_user_namespace(node: Node) -> None:
    features = {h.name: h.features.user_namespaces for h in node.client.Status().runtime_handlers}
    if not features["crun"]:
        pytest.skip("this crun, or this kernel, has no id-mapped mounts")
    linux = userns()
    linux.security_context.namespace_options.pid = cri.POD
    pod = run_pod(node, "mapped", linux)
    container = node.run(pod, "c", ["sleep", "1000"])
    assert "infra" in node.sh(container, "cat /proc/1/cmdline")
    assert node.sh(container, "cat /proc/self/uid_map").split() == ["0", "1000000", "65536"]


def test_a_terminal(node: Node) -> None:
    container = node.run(run_pod(node, "tty"), "c", ["sleep", "1000"])
    url = node.client.Exec(container_id=container, cmd=["sh", "-c", "tty; read l; exit $l"], stdin=True, stdout=True)
    client = Spdy(url.url).open_command("error", "stdin", "stdout")
    client.send("stdin", b"5\n")
    assert client.finish()["details"]["causes"][0]["message"] == "5"
    assert client.got["stdout"] == b"not a tty\n"
    url = node.client.Exec(
        container_id=container, cmd=["sh", "-c", "tty; read l; exit $l"], stdin=True, stdout=True, tty=True
    )
    client = Spdy(url.url).open_command("error", "stdin", "stdout", "resize")
    client.until("stdout", b"/dev/pts/0")
    client.send("stdin", b"5\n")
    assert client.finish()["details"]["causes"][0]["message"] == "5"


def test_commands_and_programs_that_are_not_there_are_named(node: Node) -> None:
    pod = run_pod(node, "bad")
    container = node.run(pod, "c", ["sleep", "1000"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no-such-command"):
        node.client.ExecSync(container_id=container, cmd=["no-such-command"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no-such-program"):
        node.run(pod, "absent", ["no-such-program"])


def test_limits_are_changed(node: Node) -> None:
    container = node.run(run_pod(node, "limits"), "c", ["sleep", "1000"])
    limits = cri.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=64 << 20)
    node.client.UpdateContainerResources(container_id=container, linux=limits)
    assert node.client.ContainerStats(container_id=container).stats.memory.available_bytes.value < 64 << 20
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container):
        node.client.UpdateContainerResources(
            container_id=container, linux=cri.LinuxContainerResources(cpuset_cpus="1000")
        )


def test_a_new_daemon_takes_over_and_its_cache_is_no_container(node: Node) -> None:
    pod = run_pod(node, "lasting", SHARED)
    container = node.run(pod, "c", ["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"])
    node.kill()
    node.start()
    assert node.sh(container, "echo hello") == "hello\n"
    node.client.StopContainer(container_id=container, timeout=10)
    assert node.status(container).exit_code == 9
    assert "runtime delete failed" not in node.daemon_log()
