"""An OCI runtime that does not delete: after a removal that is OK nothing of the container or pod lives or is kept."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, pidfd
from tests.support.fixtures import import_image
from tests.support.frozen_disk import frozen, mount_disk
from tests.support.node import RUNTIME, Node, processes, refused
from tests.support.waiting import SLOWNESS, eventually

FAULTY = """#!/bin/sh
case " $* " in
*" delete "*)
    case $(cat {base}/fault) in
    fails) echo "no such luck" >&2; exit 1;;
    hangs) exec {hanging};;
    lies) exit 0;;
    esac;;
*" run "*) [ $(cat {base}/fault)x != idlesx ] || exit 0;;
esac
exec {runtime} "$@"
"""

# Shorter here: a kernel or a runtime that holds on uses each of them up several times.
DEADLINES = {
    "oci_runtime._DELETE_TIMEOUT": 3,
    "container_process._GONE_TIMEOUT": 3,
    "container_process.END_TIMEOUT": 6,
}

# Of this run alone: other containers sleep too.
SLEEP = f"sleep {90_000_000 + os.getpid()}"
HANGING = f"sleep {91_000_000 + os.getpid()}"
# A container whose background process ignores SIGTERM and has a session of its own.
STUBBORN = f"setsid sh -c 'trap : TERM; while true; do {SLEEP}; done' & "


@pytest.fixture
def faulty(busybox_archive: str, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node whose OCI runtime does not delete, as the file "fault" says."""
    deadlines = getattr(request, "param", DEADLINES)
    node = Node(runtimes='ctr_stop_timeout = 10\n[runtimes.runc]\npath = "BASE/runtime"\n')
    config = Path(node.config)
    config.write_text(config.read_text().replace("BASE", node.base))
    runtime = Path(node.base) / "runtime"
    runtime.write_text(FAULTY.format(base=node.base, hanging=HANGING, runtime=shutil.which(RUNTIME)))
    runtime.chmod(0o755)
    set_fault(node, "")
    node.program = ["-m", "tests.support.hurried", *(f"criserver.runtime.{d}={s}" for d, s in deadlines.items())]
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
    assert node.settled() == []


def has_cgroup(container: str) -> bool:
    return any(glob.glob(f"{root}/criserver*/**/*{container}*", recursive=True) for root in cgroups.roots().values())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A file system that can be frozen: from then on the kernel holds each process that writes to it."""
    point = tmp_path / "disk"
    point.mkdir()
    mount_disk(tmp_path / "image", point, 16 << 20)
    try:
        yield str(point)
    finally:
        subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("fault", ["missing"])
def test_a_process_that_the_kernel_holds_keeps_its_record(faulty: Node, disk: str, fault: str) -> None:
    node = faulty
    pod = run_pod(node, "pod", cri.NODE)
    volume = cri.Mount(host_path=disk, container_path="/disk")
    script = f"while true; do echo {SLEEP} >/disk/file; done >/dev/null 2>&1 & exec {SLEEP}"
    container = run(node, pod, "c", cri.NODE, script, mounts=[volume])
    set_fault(node, fault)
    with frozen(disk):
        eventually(held)
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "have not ended", "the kernel holds them"):
            node.client.RemoveContainer(container_id=container)
        (listed,) = node.client.ListContainers().containers
        assert (listed.id, listed.state) == (container, cri.CONTAINER_EXITED)
        assert len(alive()) == 1
        for call in (node.client.StopPodSandbox, node.client.RemovePodSandbox):
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the kernel holds them"):
                call(pod_sandbox_id=pod)
        node.kill()
        node.start()
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the kernel holds them"):
            node.client.RemoveContainer(container_id=container)
    node.client.RemoveContainer(container_id=container)
    assert alive() == []
    node.remove_pods()
    assert node.settled() == []


def held() -> list[int]:
    """Those of our processes that the kernel holds: state D of /proc/PID/stat (proc(5))."""
    found = []
    for pid, words in processes():
        with contextlib.suppress(OSError):
            if SLEEP in words and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D":
                found.append(pid)
    return found


def test_processes_without_a_record_are_left_alone_until_a_reset_ends_them(faulty: Node) -> None:
    """The first process and the shim are gone, and no OCI runtime can delete: the cgroup alone shows who they are."""
    node = faulty
    pod = run_pod(node, "pod", cri.NODE)
    container = run(node, pod, "c", cri.NODE, f"{STUBBORN} exec {SLEEP}")
    # Its first process, and the one that outlives it.
    eventually(lambda: sum(words.startswith(SLEEP) for words in alive()) == 2)
    set_fault(node, "fails")
    first = node.pid(container)
    node.kill()
    for pid in (*pidfd.processes_in(f"{node.state}/containers/{container}"), first):
        os.kill(pid, signal.SIGKILL)
    os.rename(f"{node.root}/criserver.db", f"{node.root}/away")
    shutil.rmtree(f"{node.state}/records")
    node.start()
    eventually(lambda: "recovered" in node.daemon_log().rpartition("serving")[2])
    assert f'"id": "{container}"' in node.daemon_log()
    assert alive()
    node.stop()
    reset = [sys.executable, "-m", "criserver", "reset", "--yes", "--grace", "0", "--config", node.config]
    subprocess.run(reset, check=True)
    assert alive() == []
    # The address is known to the plugin alone: the record had the result of ADD.
    eventually(lambda: not [left for left in node.leftovers() if not left.startswith("ipam")])


@pytest.mark.parametrize("faulty", [{"oci_runtime._DELETE_TIMEOUT": 1000}], indirect=True)
def test_a_hanging_delete_of_a_killed_daemon_is_ended_by_the_next_one(faulty: Node) -> None:
    node = faulty
    container = node.run(node.run_pod("orphaned"), "c", ["sleep", "1000"])
    # Without its shim, the daemon itself runs the OCI runtime's delete.
    for pid in pidfd.processes_in(f"{node.state}/containers/{container}"):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: "a container's shim is gone" in node.daemon_log())
    set_fault(node, "hangs")
    os.kill(node.pid(container), signal.SIGKILL)
    eventually(lambda: hanging() != [])
    node.kill()
    assert hanging() != []
    set_fault(node, "")
    node.start()
    eventually(lambda: hanging() == [])
    eventually(lambda: "killed programs that an earlier daemon was running" in node.daemon_log())


def test_a_runtime_that_starts_nothing_is_told_in_words(faulty: Node) -> None:
    set_fault(faulty, "idles")
    container = faulty.create(faulty.run_pod("idle"), "c", ["true"])
    with pytest.raises(
        grpc.RpcError, match=r"/runtime run ended as if it had succeeded, but there is no process ID in"
    ) as e:
        faulty.client.StartContainer(container_id=container)
    assert "init.pid: No such file or directory" in str(e.value)
    assert "[Errno" not in str(e.value)


def hanging() -> list[int]:
    return [pid for pid, words in processes() if HANGING in words]
