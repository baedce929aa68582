"""Options of a runtime handler, and pods that are sandbox containers, as gVisor needs them.

gVisor is not there to be tested with. A script around the OCI runtime stands for runsc: it makes a container only if
the annotations say that it is a sandbox, or which sandbox it joins, as runsc does (runsc/specutils/cri.go).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import serving
from tests.support.node import RUNTIME, Node, processes, refused
from tests.support.pods import sandbox, secured, shared
from tests.support.waiting import eventually

SLEEP = ["sleep", "1000"]
RUNSC = f"""#!{sys.executable} -ISB
import json, os, sys
args = [word for word in sys.argv[1:] if word != "--platform=none"]
if len(args) == len(sys.argv) - 1 and "features" not in args:
    sys.exit("the option --platform is missing")
if "run" in args:
    told = json.load(open(args[args.index("--bundle") + 1] + "/config.json"))["annotations"]
    kind, pod = told["io.kubernetes.cri.container-type"], told["io.kubernetes.cri.sandbox-id"]
    joined = kind == "container" and os.path.isdir(args[args.index("--root") + 1] + "/" + pod)
    if not (joined or kind == "sandbox" and args[-1] == pod):
        sys.exit("no such sandbox")
os.execvp("{RUNTIME}", ["{RUNTIME}", *args])
"""


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with the runtime for itself, and with options."""
    base = tmp_path_factory.mktemp("handlers")
    (base / "runsc").write_text(RUNSC)
    (base / "runsc").chmod(0o755)
    (base / "net.d").mkdir()
    with serving(
        busybox_archive,
        f'[runtimes.runc]\npath = "{RUNTIME}"\n'
        f'[runtimes.runsc]\npath = "{base}/runsc"\nargs = ["--platform=none"]\nsandbox = "container"\n'
        f'root = "{base}/root"\npod_annotations = ["dev.gvisor.*"]\ncontainer_annotations = []\n'
        f'[runtimes.apart]\npath = "{RUNTIME}"\ncni_conf_dir = "{base}/net.d"\n'
        "privileged_without_host_devices = true\n",
    ) as node:
        network = json.loads(Path(node.cni, "10-e2e.conflist").read_text())
        (base / "net.d" / "1.conflist").write_text(json.dumps({**network, "name": "apart"}))
        yield node


def run_pod(node: Node, handler: str, name: str = "pod", **fields: Any) -> str:
    pod: str = node.client.RunPodSandbox(config=node.pod(name, **fields), runtime_handler=handler).pod_sandbox_id
    node.pods.add(pod)
    return pod


def told(node: Node, key: str) -> dict[str, str]:
    with open(f"{node.state}/containers/{key}/config.json") as f:
        found: dict[str, str] = json.load(f)["annotations"]
    return found


def infra(node: Node, pod: str) -> list[int]:
    """The pod's own process."""
    return [pid for pid, words in processes() if words.startswith("/infra -P") and _in_cgroup(pid, pod)]


def _in_cgroup(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/cgroup").read_text()


def test_a_pod_is_a_sandbox_container_that_its_containers_join(node: Node) -> None:
    pod = run_pod(node, "runsc", annotations={"dev.gvisor.spec": "1", "other": "2"})
    # The OCI runtime's own process becomes the pod's just after the start.
    eventually(lambda: len(infra(node, pod)) == 1)
    container = node.run(pod, "c", SLEEP, annotations={"own": "3"})
    assert node.sh(container, "hostname") == "pod\n"
    found = {key: told(node, key) for key in (pod, container)}
    assert found[pod]["io.kubernetes.cri.container-type"] == "sandbox"
    assert found[container]["io.kubernetes.cri.image-name"] == "localhost/busybox:latest"
    passed = {key: {name for name in names if not name.startswith("io.kubernetes")} for key, names in found.items()}
    assert passed == {pod: {"dev.gvisor.spec"}, container: {"dev.gvisor.spec"}}


def test_its_pid_namespace_is_shared_only_where_the_pod_says_so(node: Node) -> None:
    modes: list[tuple[cri.NamespaceMode, bool]] = [(cri.CONTAINER, False), (cri.POD, True)]
    for mode, seen in modes:
        pod = run_pod(node, "runsc", f"pod-{mode}", linux=shared(pid=mode))
        container = node.run(pod, f"c-{mode}", SLEEP)
        assert ("/infra" in node.sh(container, "cat /proc/1/cmdline")) is seen


def test_a_sandbox_container_outlives_the_daemon_and_its_end_is_seen(node: Node) -> None:
    pod = run_pod(node, "runsc")
    container = node.run(pod, "c", SLEEP)
    node.kill()
    node.start()
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
    assert node.sh(container, "echo alive") == "alive\n"
    (process,) = infra(node, pod)
    os.kill(process, 9)
    eventually(lambda: node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_NOTREADY)


def test_a_handler_has_a_network_of_its_own(node: Node) -> None:
    pod = run_pod(node, "apart")
    files = f"{node.base}/ipam"
    assert os.listdir(f"{files}/apart") and pod
    node.remove_pods()
    assert not [name for name in os.listdir(f"{files}/apart") if name[0].isdigit()]


def test_a_privileged_container_without_the_hosts_devices(node: Node) -> None:
    found = {}
    for handler in ("apart", "runc"):
        pod = run_pod(node, handler, handler, linux=sandbox(privileged=True))
        found[handler] = node.sh(node.run(pod, f"c-{handler}", SLEEP, **secured(privileged=True)), "ls /dev").split()
    assert "kmsg" in found["runc"]
    assert "kmsg" not in found["apart"]


@pytest.mark.parametrize("name", ["rdt.resources.beta.kubernetes.io/pod", "blockio.resources.beta.kubernetes.io/pod"])
def test_a_class_that_nobody_would_apply_is_refused(node: Node, name: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, name, "gold"):
        run_pod(node, "runc", annotations={name: "gold"})
    pod = run_pod(node, "runc")
    kind = name.partition(".")[0]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"io.kubernetes.cri.{kind}-class", "gold"):
        node.create(pod, "c", SLEEP, annotations={f"io.kubernetes.cri.{kind}-class": "gold"})
    assert node.create(pod, "c", SLEEP, annotations={f"io.kubernetes.cri.{kind}-class": ""})


def test_reset_finds_what_is_in_a_root_of_its_own(node: Node) -> None:
    pod = run_pod(node, "runsc")
    node.run(pod, "c", SLEEP)
    assert node.stop() == 0
    command = [sys.executable, "-m", "criserver", "reset", "--grace", "0", "--config", node.config, "--yes"]
    subprocess.run(command, check=True, capture_output=True)
    node.start()
    assert node.settled() == []
