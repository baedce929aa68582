"""An OCI runtime that does not delete: after a removal that is OK nothing of the container or pod lives or is kept."""

from __future__ import annotations

import glob
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.fixtures import import_image
from tests.support.node import RUNTIME, Node, processes
from tests.support.waiting import SLOWNESS

FAULTY = """#!/bin/sh
case " $* " in
*" delete "*)
    case $(cat {base}/fault) in
    fails) echo "no such luck" >&2; exit 1;;
    hangs) exec sleep 600;;
    lies) exit 0;;
    esac;;
esac
exec {runtime} "$@"
"""

# Of this run alone: other containers sleep too.
SLEEP = f"sleep {90_000_000 + os.getpid()}"
# A container whose background process ignores SIGTERM and has a session of its own.
STUBBORN = f"setsid sh -c 'trap : TERM; while true; do {SLEEP}; done' & "


@pytest.fixture
def faulty(busybox_archive: str) -> Iterator[Node]:
    """A node whose OCI runtime does not delete, as the file "fault" says."""
    node = Node(runtimes='[runtimes.runc]\npath = "BASE/runtime"\n')
    config = Path(node.config)
    config.write_text(config.read_text().replace("BASE", node.base))
    runtime = Path(node.base) / "runtime"
    runtime.write_text(FAULTY.format(base=node.base, runtime=shutil.which(RUNTIME)))
    runtime.chmod(0o755)
    set_fault(node, "")
    try:
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        set_fault(node, "")
        node.close()


def set_fault(node: Node, fault: str) -> None:
    runtime = f"{node.base}/runtime"
    Path(f"{node.base}/fault").write_text(fault)
    if fault == "missing":
        os.rename(runtime, f"{runtime}.away")
    elif os.path.exists(f"{runtime}.away"):
        os.rename(f"{runtime}.away", runtime)


def alive() -> list[str]:
    return [words for _, words in processes() if SLEEP in words]


def run_pod(node: Node, name: str, mode: cri.NamespaceMode) -> str:
    namespaces = cri.NamespaceOption(pid=mode)
    security = cri.LinuxSandboxSecurityContext(namespace_options=namespaces)
    return node.run_pod(name, linux=cri.LinuxPodSandboxConfig(security_context=security))


def run(node: Node, pod: str, name: str, mode: cri.NamespaceMode, script: str, **fields: object) -> str:
    security = cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=mode))
    linux = cri.LinuxContainerConfig(security_context=security)
    return node.run(pod, name, ["sh", "-c", script], linux=linux, **fields)


MODES = {"host": cri.NODE, "shared": cri.POD, "own": cri.CONTAINER}


@pytest.mark.parametrize("fault", ["fails", "lies", "missing", "hangs"])
def test_a_removal_that_is_ok_leaves_nothing(faulty: Node, fault: str) -> None:
    """Containers that run, and some whose first process alone has ended, are removed; others with their pods."""
    node = faulty
    kept = {name: run_pod(node, f"kept-{name}", mode) for name, mode in MODES.items()}
    removed = {name: run_pod(node, f"removed-{name}", mode) for name, mode in MODES.items()}
    containers = {
        run(node, pods[name], role, mode, f"{STUBBORN} exec {SLEEP}"): pods
        for pods in (kept, removed)
        for name, mode in MODES.items()
        for role in ("living", "ended")
    }
    set_fault(node, fault)
    for container in node.client.ListContainers().containers:
        if container.metadata.name == "ended":
            os.kill(node.pid(container.id), signal.SIGKILL)

    def remove_container(container: str) -> None:
        node.client.RemoveContainer(deadline=100 * SLOWNESS, container_id=container)
        assert not os.path.exists(f"{node.state}/runtimes/runc/{container}")
        assert not os.path.exists(f"{node.state}/containers/{container}")
        assert [path for _, path in processes() if path.endswith(f"/{container}")] == []

    def remove_pod(pod: str) -> None:
        node.client.StopPodSandbox(deadline=100 * SLOWNESS, pod_sandbox_id=pod)
        assert not any(has_cgroup(c.id) for c in node.client.ListContainers().containers if c.pod_sandbox_id == pod)
        node.client.RemovePodSandbox(deadline=100 * SLOWNESS, pod_sandbox_id=pod)

    with ThreadPoolExecutor(10) as threads:
        calls = [threads.submit(remove_container, container) for container, pods in containers.items() if pods is kept]
        calls += [threads.submit(remove_pod, pod) for pod in removed.values()]
        for call in calls:
            call.result()
    assert alive() == []
    assert node.client.ListContainers().containers == []
    assert {pod.id for pod in node.client.ListPodSandbox().items} == set(kept.values())
    set_fault(node, "")
    node.remove_pods()
    assert node.leftovers() == []


def has_cgroup(container: str) -> bool:
    return any(glob.glob(f"{root}/criserver*/**/*{container}*", recursive=True) for root in cgroups.roots().values())
