"""Faults of the node beneath running pods: a disk that stands still, a lost database, helpers that hang."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, pidfd, recovery
from snapshotter import mounts
from tests.support.fixtures import import_image
from tests.support.frozen_disk import frozen, give_disk, mount_disk
from tests.support.node import RUNTIME, Node, handler, processes, refused
from tests.support.shell_network import REFUSES, network_of
from tests.support.waiting import SLOWNESS, eventually

# An OCI runtime after which the disk stands still, where there is a file "freeze" beside it.
FREEZING = """#!/bin/sh
{runtime} "$@" || exit
[ ! -e "${{0%/*}}/freeze" ] || fsfreeze --freeze {root}
"""


@pytest.fixture
def disk(busybox_archive: str) -> Iterator[Node]:
    """A node whose root directory is on a disk that can be frozen. Its handler "freezing" does so after a start."""
    node = Node()
    program = Path(node.base) / "freezing"
    program.write_text(FREEZING.format(runtime=shutil.which(RUNTIME), root=node.root))
    program.chmod(0o755)
    with open(node.config, "a") as f:
        f.write(handler("freezing", str(program)))
    give_disk(node)
    try:
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        node.close()


def test_reading_does_not_wait_for_a_disk_that_stands_still(disk: Node, busybox_archive: str) -> None:
    """Calls that write to it wait, each for itself: pods and containers are made and removed, images come."""
    pod = disk.run_pod("one")
    container = disk.run(pod, "c", ["sleep", "1000"])
    old = [disk.create(pod, f"old{number}", ["true"]) for number in range(3)]
    made: list[object] = []

    def calling(call: Callable[[], object]) -> threading.Thread:
        return threading.Thread(target=lambda: made.append(call()))

    callers = [
        *(calling(lambda n=number: disk.run_pod(f"waiting{n}")) for number in range(10)),  # type: ignore[misc]
        *(calling(lambda n=number: disk.create(pod, f"new{n}")) for number in range(3)),  # type: ignore[misc]
        *(calling(lambda c=found: disk.client.RemoveContainer(container_id=c)) for found in old),  # type: ignore[misc]
        *(calling(lambda: import_image(disk, busybox_archive)) for _ in range(2)),
    ]
    with frozen(disk.root):
        for caller in callers:
            caller.start()
        time.sleep(0.5)  # all of them stand still now
        # A call that waits for the disk ends with its deadline, as the disk stands still until the last has ended.
        assert container in [c.id for c in disk.client.ListContainers().containers]
        assert [p.id for p in disk.client.ListPodSandbox().items] == [pod]
        assert disk.client.Status().status.conditions
        assert disk.status(container).state == cri.CONTAINER_RUNNING
        assert disk.sh(container, "echo hi") == "hi\n"
        assert disk.client.ListContainerStats().stats
        assert disk.client.ListImages().images
        assert made == []
    for caller in callers:
        caller.join(60 * SLOWNESS)
    assert len(made) == len(callers)
    assert len(disk.client.ListPodSandbox().items) == 11
    assert len(disk.client.ListContainers().containers) == 4


def test_a_start_is_told_when_it_is_on_disk(disk: Node) -> None:
    """A daemon that is killed after its answer must know that the container runs, also from a shim that is silent."""
    pod = disk.client.RunPodSandbox(config=disk.pod("one"), runtime_handler="freezing").pod_sandbox_id
    disk.pods.add(pod)
    container = disk.create(pod, "c", ["sleep", "1000"])
    caller = threading.Thread(target=lambda: disk.client.StartContainer(container_id=container))
    Path(disk.base, "freeze").touch()
    try:
        caller.start()
        eventually(lambda: disk.status(container).state == cri.CONTAINER_RUNNING)
        disk.client.Version()
        assert caller.is_alive()
    finally:
        os.unlink(Path(disk.base, "freeze"))
        subprocess.run(["fsfreeze", "--unfreeze", disk.root], check=True)
    caller.join(60 * SLOWNESS)
    assert not caller.is_alive()


@pytest.mark.parametrize("words", ["echo words", "printf words"], ids=["a line", "a part of a line"])
def test_an_exit_code_is_kept_while_the_disk_of_the_log_stands_still(node: Node, tmp_path: Path, words: str) -> None:
    """The shim waits in a write, and cannot tell it. The kernel has it until the shim has reaped, then the disk."""
    logs = tmp_path / "logs"
    logs.mkdir()
    mount_disk(tmp_path / "disk", logs, 64 << 20)
    try:
        config = node.pod("one")
        config.log_directory = str(logs / "pod")
        pod = node.client.RunPodSandbox(config=config).pod_sandbox_id
        node.pods.add(pod)
        container = node.run(pod, "c", ["sh", "-c", f"until [ -e /go ]; do sleep 0.05; done; {words}; exit 3"])
        pid = node.pid(container)
        record = Path(f"{node.state}/containers/{container}/exit.json")
        with frozen(str(logs)):
            Path(f"/proc/{pid}/root/go").touch()
            eventually(lambda: record.exists() or pidfd.zombie_code(pid) == 3)
            node.client.StopContainer(container_id=container, timeout=1)
            status = node.status(container)
            assert (status.state, status.exit_code) == (cri.CONTAINER_EXITED, 3)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
    finally:
        subprocess.run(["umount", "--lazy", logs], check=True)


def lose(path: str) -> None:
    for name in (path, f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def empty(path: str) -> None:
    lose(path)
    with open(path, "w"):
        pass


def restore(path: str) -> None:
    lose(path)
    shutil.copy(f"{path}.older", path)


def listed(node: Node) -> list[object]:
    pods = sorted(node.client.ListPodSandbox().items, key=lambda pod: pod.id)
    return [pods, node.client.ListContainers().containers, node.client.ListImages().images]


@pytest.mark.parametrize("fault", [lose, empty, restore])
def test_pods_outlive_the_database(node: Node, fault: Any) -> None:
    node.kill()
    database = f"{node.root}/criserver.db"
    shutil.copy(database, f"{database}.older")
    node.start()
    pod = node.run_pod("one")
    container = node.run(pod, "c", ["sleep", "1000"])
    shared = cri.LinuxPodSandboxConfig(
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD))
    )
    other = node.run_pod("shared", linux=shared)
    node.run(other, "d", ["sleep", "1000"])
    before = listed(node)
    pid = node.pid(container)
    node.kill()
    fault(database)
    node.start()
    assert listed(node) == before
    assert node.pid(container) == pid
    assert node.sh(container, "echo hi") == "hi\n"
    node.remove_pods()
    node.kill()
    fault(database)
    node.start()
    assert node.client.ListPodSandbox().items == []


def test_what_lives_without_any_record_is_left_alone_until_a_reset(busybox_archive: str) -> None:
    node = Node()
    try:
        node.start()
        import_image(node, busybox_archive)
        pod = node.run_pod("one")
        container = node.run(pod, "c", ["sleep", "987654"])
        node.kill()
        lose(f"{node.root}/criserver.db")
        shutil.rmtree(f"{node.state}/records")
        node.start()
        eventually(lambda: "recovered" in node.daemon_log().rpartition("serving")[2])
        assert node.client.ListPodSandbox().items == []
        assert any("sleep 987654" in words for _, words in processes())
        for name in (pod, container):
            assert f'"id": "{name}"' in node.daemon_log()
        assert "`criserver reset` removes it" in node.daemon_log()
        import_image(node, busybox_archive)
        node.run(node.run_pod("two"), "c", ["sleep", "1000"])
        node.stop()
        reset = [sys.executable, "-m", "criserver", "reset", "--yes", "--grace", "0", "--config", node.config]
        done = subprocess.run(reset, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not any("sleep 987654" in words for _, words in processes())
    finally:
        node.close()


def test_a_process_counts_whatever_its_cgroup_is_called(tmp_path: Path) -> None:
    """A container may give the cgroups in its own one any names."""
    hierarchies, container = cgroups.roots(), secrets.token_hex(32)
    top = f"{hierarchies.get('pids') or hierarchies['']}{cgroups.OWN}/{container}"
    inner = os.fsencode(top) + b"/\xe9"
    os.makedirs(inner)
    process = subprocess.Popen(["sleep", "1000"])
    try:
        Path(os.fsdecode(inner), "cgroup.procs").write_text(str(process.pid))
        (tmp_path / "init.pid").write_text(str(process.pid))
        assert recovery._has_process(str(tmp_path), container)
        assert not recovery._has_process(str(tmp_path), secrets.token_hex(32))
    finally:
        process.kill()
        process.wait()
        eventually(lambda: Path(os.fsdecode(inner), "cgroup.procs").read_text() == "")
        os.rmdir(inner)
        os.rmdir(top)


HANGING = """#!/bin/sh
case " $* " in
*" delete "*) [ ! -e {flag} ] || exec sleep 600;;
esac
exec {runtime} "$@"
"""


@pytest.fixture
def stuck(busybox_archive: str) -> Iterator[Node]:
    """A node whose OCI runtime hangs when it is to delete a container, while the file "hang" is there.

    The daemon waits longer for a deletion than any call of a test.
    """
    node = Node(runtimes='[runtimes.runc]\npath = "BASE/runtime"\n')
    node.program = ["-m", "tests.support.hurried", "criserver.runtime.oci_runtime._DELETE_TIMEOUT=1000"]
    config = Path(node.config)
    config.write_text(config.read_text().replace("BASE", node.base))
    runtime = Path(node.base) / "runtime"
    runtime.write_text(HANGING.format(flag=f"{node.base}/hang", runtime=shutil.which(RUNTIME)))
    runtime.chmod(0o755)
    try:
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{node.base}/hang")
        node.close()


def test_a_start_waits_for_nothing_that_is_stuck(stuck: Node) -> None:
    """Ten left-overs and one pod that hang when the OCI runtime is to delete them; the other pods are served."""
    node = stuck
    bad, good = node.run_pod("bad"), node.run_pod("good")
    dead = node.run(bad, "c", ["sleep", "1000"])
    alive = node.run(good, "c", ["sleep", "1000"])
    Path(f"{node.base}/hang").touch()
    removal = node.client.RemoveContainer.begin(container_id=dead)
    eventually(lambda: hanging() and b'"removing"' in Path(f"{node.state}/records/containers/{dead}").read_bytes())
    removal.cancel()
    node.kill()
    for number in range(10):
        os.makedirs(f"{node.state}/runtimes/runc/left{number}")
    node.start(recovered=False)
    assert node.sh(alive, "echo hi") == "hi\n"
    assert node.status(alive).state == cri.CONTAINER_RUNNING
    assert len(node.client.ListContainers().containers) == 2
    node.run(good, "d", ["true"])
    node.run_pod("new")
    with pytest.raises(grpc.RpcError) as refused:
        node.client.ContainerStatus(deadline=1, container_id=dead)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    os.unlink(f"{node.base}/hang")
    end_sleepers()
    # What was waiting goes on, and the call that waits for it as well.
    node.client.RemoveContainer(container_id=dead)
    assert {c.metadata.name for c in node.client.ListContainers().containers} == {"c", "d"}
    eventually(lambda: end_sleepers() or not glob.glob(f"{node.state}/runtimes/runc/left*"))


def hanging() -> list[int]:
    """The OCI runtimes that hang."""
    return [pid for pid, words in processes() if words.startswith("sleep 600")]


def end_sleepers() -> None:
    for pid in hanging():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_nursery_that_does_not_answer_is_replaced(node: Node) -> None:
    pod = node.run_pod("one")
    before = node.run(pod, "before", ["sleep", "1000"])
    assert node.process is not None
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    (nursery,) = (int(pid) for pid in children if b"nursery" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(nursery, signal.SIGSTOP)
    container = node.run(pod, "c", ["sleep", "1000"])
    assert not os.path.exists(f"/proc/{nursery}")
    assert node.status(container).state == node.status(before).state == cri.CONTAINER_RUNNING
    node.run(pod, "d", ["true"])


def command(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "criserver", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60 * SLOWNESS, check=False)


def test_a_pod_whose_network_can_never_be_undone_is_removed_by_force(node: Node) -> None:
    result = json.dumps({"cniVersion": "1.0.0", "ips": [{"address": "10.9.9.9/24"}]})
    with network_of(node, f"ADD) echo '{result}';;\nDEL) {REFUSES}"):
        pod = node.run_pod("stuck")
        node.run(pod, "c", ["sleep", "1000"])
        refused = command(node, "pod", "remove", "--config", node.config, pod)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "the cluster does not answer" in refused.stderr
        assert [p.id for p in node.client.ListPodSandbox().items] == [pod]
        done = command(node, "pod", "remove", "--config", node.config, "--force", pod[:12])
        assert (done.returncode, done.stdout) == (0, f"removed {pod}\n")
        assert "warning: its network plugins did not clean up: CNI plugin stuck (DEL, network stuck)" in done.stderr
        assert node.client.ListPodSandbox().items == []
        assert node.client.ListContainers().containers == []
        assert node.settled() == []
        unknown = command(node, "pod", "remove", "--config", node.config, "--force", pod)
        assert unknown.returncode == 1
        assert pod in unknown.stderr


def test_a_pod_whose_plugin_refuses_all_leaves_nothing(node: Node) -> None:
    with network_of(node, f"*) {REFUSES}"):
        with pytest.raises(grpc.RpcError, match="the cluster does not answer"):
            node.run_pod("never")
        assert node.client.ListPodSandbox().items == []
        assert node.settled() == []


@pytest.fixture(scope="module")
def unstarted() -> Iterator[Node]:
    """A node whose daemon does not run."""
    node = Node()
    try:
        yield node
    finally:
        node.close()


@pytest.mark.parametrize("words", [("serve",), ("reset", "--yes")])
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("root/criserver.db", "root/criserver.db: Is a directory"),
        ("root/content", "root/content/blobs: Not a directory"),
        ("root/snapshots", "root/snapshots/layers: Not a directory"),
        ("state/records", "state/records: File exists"),
        ("root", "root/criserver.root: Read-only file system"),
    ],
)
def test_what_keeps_a_daemon_from_starting_is_told_in_words(
    unstarted: Node, words: tuple[str, ...], path: str, told: str
) -> None:
    node = unstarted
    for directory in (node.root, node.state):
        for name in os.listdir(directory):
            subprocess.run(["rm", "-rf", f"{directory}/{name}"], check=True)
        with open(f"{directory}/criserver.lock", "w"):
            pass
    wrong = f"{node.base}/{path}"
    if path == "root":
        subprocess.run(["mount", "-o", "remount,ro", node.root], check=True)
    elif path.endswith(".db"):
        os.mkdir(wrong)
    else:
        with open(wrong, "w"):
            pass
    try:
        done = command(node, *words, "--config", node.config)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", node.root], check=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert told in done.stderr
    assert done.stderr.splitlines()[-1].startswith("criserver: ")


def test_a_pod_whose_namespaces_somebody_has_unmounted_is_not_ready_after_a_failed_start(node: Node) -> None:
    pod = node.run_pod("unpinned")
    running = node.run(pod, "running", ["sleep", "1000"])
    created = node.create(pod, "created", ["sleep", "1000"])
    for pin in (f"{node.netns}/criserver-{pod}", *mounts.mounts_below(f"{node.state}/ns/{pod}")):
        mounts.unmount(pin)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "container created cannot be started"):
        node.client.StartContainer(container_id=created)
    eventually(lambda: node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_NOTREADY)
    info = node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"]
    assert f"{node.netns}/criserver-{pod} is gone" in info
    assert node.sh(running, "echo alive") == "alive\n"
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    again = node.run_pod("unpinned", attempt=1)
    assert node.sh(node.run(again, "c", ["sleep", "1000"]), "echo alive") == "alive\n"


@pytest.mark.parametrize(
    ("damage", "words"), [("{", "it is damaged"), ("[]", "it has no process"), (None, "it is gone")]
)
def test_a_bundle_that_somebody_has_damaged_is_named(node: Node, damage: str | None, words: str) -> None:
    container = node.run(node.run_pod("damaged"), "c", ["sleep", "1000"])
    path = Path(f"{node.state}/containers/{container}/config.json")
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    with refused(grpc.StatusCode.DATA_LOSS, str(path), words, "the container has to be made anew"):
        node.client.ExecSync(container_id=container, cmd=["true"], timeout=5)
    assert json.loads(node.client.ContainerStatus(container_id=container, verbose=True).info["info"])
    node.client.StopContainer(container_id=container, timeout=0)
    assert node.status(container).exit_code == 137
