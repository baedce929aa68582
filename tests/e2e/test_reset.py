"""``criserver reset``: a node's pods are taken down without a daemon, and nothing of them is left."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.support.fixtures import import_image, serving
from tests.support.node import BRIDGE, NETWORK, Node, filled, own_cgroups, processes
from tests.support.waiting import SLOWNESS, eventually


@pytest.fixture
def own_node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    """A node of the test's own, which it leaves without a daemon."""
    with serving(busybox_archive) as node:
        yield node


def reset(node: Node, *words: str, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "criserver", "reset", "--config", node.config, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS, input=answer)


def shared_pids() -> cri.LinuxPodSandboxConfig:
    options = cri.NamespaceOption(pid=cri.POD)
    return cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))


def traces(node: Node) -> list[str]:
    """All that a node's pods could leave on the host, wherever it is."""
    found = [point for point in mounts.mounts_below(node.base) if point != node.root]
    found += [f"{pid} {words}" for pid, words in processes() if node.base in words]
    found += [path for path in own_cgroups() if any(pod in path for pod in node.pods)]
    found += glob.glob(f"/sys/class/net/{BRIDGE}/brif/*")
    return found + [f"lease {name}" for name in os.listdir(f"{node.base}/ipam/{NETWORK}") if name[0].isdigit()]


def test_pods_of_a_killed_daemon_are_removed_with_all_that_they_are(own_node: Node) -> None:
    node = own_node
    for name in ("one", "two"):
        pod = node.run_pod(name, linux=shared_pids())
        node.run(pod, "running", ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"])
        node.create(pod, "created", ["true"])
        node.wait(node.run(pod, "exited", ["true"]))
    node.stop()
    node.start()
    node.kill()
    assert traces(node) != []

    done = reset(node, "--yes")
    assert (done.returncode, done.stdout) == (0, "removed 2 pods and 6 containers\n"), done.stderr
    assert traces(node) == []
    assert not os.path.exists(node.state)
    assert os.listdir(f"{node.root}/snapshots/active") == []
    # The images are there still: the next daemon starts with them and without pods.
    node.start()
    assert node.client.ListPodSandbox().items == []
    assert [i.repo_tags for i in node.client.ListImages().images] == [["localhost/busybox:latest"]]
    node.stop()

    done = reset(node, "--yes", "--images")
    assert (done.returncode, done.stdout) == (0, "removed 0 pods and 0 containers\n"), done.stderr
    assert os.listdir(node.root) == []  # it is a file system of its own here


def test_a_full_state_directory(own_node: Node) -> None:
    node = own_node
    node.run(node.run_pod("full"), "c", ["sleep", "1000"])
    node.kill()
    with filled(node.base):
        done = reset(node, "--yes", "--grace", "0")
    assert (done.returncode, done.stdout) == (0, "removed 1 pod and 1 container\n"), done.stderr
    assert traces(node) == []


def test_containers_get_their_stop_signal_and_time_to_end(own_node: Node) -> None:
    node = own_node
    pod = node.run_pod("graceful")
    script = "; echo ready; while :; do sleep 0.05; done"
    polite = node.run(pod, "polite", ["sh", "-c", f"trap 'echo bye; exit 0' TERM{script}"])
    deaf = node.run(pod, "deaf", ["sh", "-c", f"trap '' TERM{script}"])
    for container in (polite, deaf):
        eventually(lambda name=container: node.log(name) == "ready\n")  # type: ignore[misc]
    path = node.status(polite).log_path
    node.kill()
    done = reset(node, "--yes", "--grace", "4")
    assert done.returncode == 0, done.stderr
    with open(path) as f:
        assert f.read().endswith("bye\n")
    assert traces(node) == []


def test_a_running_daemon_is_named_and_nothing_is_done(own_node: Node) -> None:
    node = own_node
    container = node.run(node.run_pod("safe"), "c", ["sleep", "1000"])
    done = reset(node, "--yes")
    assert done.returncode == 1
    assert node.process is not None
    assert f"another criserver (PID {node.process.pid}) uses {node.root}; stop it first" in done.stderr
    assert node.status(container).state == cri.CONTAINER_RUNNING


def test_without_a_terminal_it_wants_to_be_told_yes(own_node: Node) -> None:
    node = own_node
    container = node.run(node.run_pod("asked"), "c", ["sleep", "1000"])
    node.kill()
    done = reset(node, answer="y\n")
    assert done.returncode == 1
    assert "give --yes" in done.stderr
    node.start()
    assert node.status(container).state == cri.CONTAINER_RUNNING


def test_a_network_plugin_that_fails_keeps_no_pod(own_node: Node) -> None:
    node = own_node
    node.run(node.run_pod("stuck"), "c", ["sleep", "1000"])
    os.mkdir(f"{node.base}/bin")
    refusing = f"{node.base}/bin/bridge"
    words = json.dumps({"code": 999, "msg": "the cluster does not answer"})
    with open(refusing, "w") as f:
        f.write(f"#!/bin/sh\ncat >/dev/null\necho '{words}'\nexit 1\n")
        os.fchmod(f.fileno(), 0o755)
    node.kill()
    done = reset(node, "--yes", "--grace", "0")
    assert done.returncode == 0, done.stderr
    assert "warning: pod e2e/stuck (" in done.stderr
    assert "the cluster does not answer" in done.stderr
    # Only what the plugin keeps outside the pod's namespaces is there still.
    assert [trace.partition(" ")[0] for trace in traces(node)] == ["lease"]


def test_a_pod_that_cannot_be_ended_is_named_and_what_it_needs_is_kept(own_node: Node) -> None:
    node = own_node
    pod = node.run_pod("busy")
    node.run(pod, "c", ["sleep", "1000"])
    node.kill()
    # Something else of the node in one of our directories, which nobody may delete through.
    mine = f"{node.state}/records/mine"
    os.mkdir(mine)
    subprocess.run(["mount", "-t", "tmpfs", "mine", mine], check=True)
    with open(f"{mine}/precious", "w"):
        pass
    try:
        done = reset(node, "--yes", "--images", "--grace", "0")
        assert done.returncode == 1
        assert f"left: mount {mine}" in done.stderr
        assert os.path.exists(f"{mine}/precious")
    finally:
        mounts.unmount(mine)
    assert reset(node, "--yes").returncode == 0
    assert traces(node) == []


def test_where_there_is_nothing_nothing_is_made(nothing_left: None, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'root = "{tmp_path}/root"\nstate = "{tmp_path}/state"\n')
    command = [sys.executable, "-m", "criserver", "reset", "--yes", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    assert (done.returncode, done.stdout) == (0, "removed 0 pods and 0 containers\n")
    assert os.listdir(tmp_path) == ["config.toml"]


def test_what_criserver_did_not_make_is_neither_used_nor_deleted(own_node: Node) -> None:
    node = own_node
    node.run(node.run_pod("guest"), "c", ["sleep", "1000"])
    node.kill()
    # Files of somebody else that came later: they stay.
    for directory in (node.state, node.root):
        os.makedirs(f"{directory}/theirs/below")
        with open(f"{directory}/theirs/below/precious", "w"):
            pass
    mounted = f"{node.state}/theirs/mounted"
    os.mkdir(mounted)
    subprocess.run(["mount", "-t", "tmpfs", "theirs", mounted], check=True)
    try:
        done = reset(node, "--yes", "--images", "--grace", "0")
    finally:
        mounts.unmount(mounted)
    assert (done.returncode, done.stdout) == (0, "removed 1 pod and 1 container\n"), done.stderr
    for directory, marker in ((node.state, "criserver.state"), (node.root, "criserver.root")):
        assert f"warning: {directory}/theirs stays: criserver did not make it" in done.stderr
        assert sorted(os.listdir(directory)) == [marker, "theirs"]
        assert os.path.exists(f"{directory}/theirs/below/precious")
    # A directory that never was ours: nothing is made or deleted in it.
    for directory, marker in ((node.state, "criserver.state"), (node.root, "criserver.root")):
        os.unlink(f"{directory}/{marker}")
    done = reset(node, "--yes", "--images")
    assert (done.returncode, done.stdout) == (0, "removed 0 pods and 0 containers\n"), done.stderr
    assert f"state = {node.state}: it has files that criserver did not make (theirs)" in done.stderr
    assert f"root = {node.root}: it has files that criserver did not make (theirs)" in done.stderr
    assert os.listdir(node.root) == os.listdir(node.state) == ["theirs"]
    with pytest.raises(AssertionError, match=f"root = {node.root}: it has files that criserver did not make"):
        node.start()
    assert "Traceback" not in node.daemon_log()
    assert os.listdir(node.root) == os.listdir(node.state) == ["theirs"]
    # Directories of a release without markers are known by the lock file.
    for directory in (node.root, node.state):
        shutil.rmtree(f"{directory}/theirs")
    node.start()
    node.stop()
    for directory, marker in ((node.state, "criserver.state"), (node.root, "criserver.root")):
        os.unlink(f"{directory}/{marker}")
    node.start()
    node.stop()
    assert os.path.exists(f"{node.root}/criserver.root")
    assert os.path.exists(f"{node.state}/criserver.state")


def test_records_that_are_lost_do_not_keep_their_containers(own_node: Node) -> None:
    node = own_node
    container = node.run(node.run_pod("forgotten"), "c", ["sleep", "1000"])
    pid = node.pid(container)
    node.kill()
    for name in os.listdir(node.root):
        if name.startswith("criserver.db"):
            os.unlink(f"{node.root}/{name}")
    shutil.rmtree(f"{node.state}/records")
    done = reset(node, "--yes")
    assert (done.returncode, done.stdout) == (0, "removed 0 pods and 0 containers\n"), done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert [trace.partition(" ")[0] for trace in traces(node)] == ["lease"]


def test_records_that_cannot_be_read_do_not_keep_their_pods(own_node: Node) -> None:
    node = own_node
    pods = [node.run_pod("newer"), node.run_pod("plain")]
    containers = [node.run(pod, "c", ["sleep", "1000"]) for pod in pods]
    pids = [node.pid(container) for container in containers]
    node.kill()
    node.rewrite("sandboxes", pods[0], lambda fields: {**fields, "version": 99, "more": []})
    node.rewrite("containers", containers[1], lambda fields: {**fields, "state": "asleep"})
    done = reset(node, "--yes")
    assert (done.returncode, done.stdout) == (0, "removed 2 pods and 2 containers\n"), done.stderr
    for words in (
        f"record {pods[0]} of sandboxes is of version 99, and this criserver knows 3 at most",
        "its network plugins did not clean up",
        f"record {containers[0]} of containers is damaged (ValueError: its pod sandbox {pods[0]} has no record)",
        f"record {containers[1]} of containers is damaged (ValueError: 'asleep'",
    ):
        assert words in done.stderr
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    # Its plugin was not told of the pod that could not be read.
    assert [trace.partition(" ")[0] for trace in traces(node)] == ["lease"]
    done = reset(node, "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "removed 0 pods and 0 containers\n", "")


def test_directories_behind_links_are_as_good_as_others(nothing_left: None, busybox_archive: str) -> None:
    """runc takes no root file system behind a link. The kernel names mounts and working directories by real paths."""
    node = Node()
    try:
        os.symlink(".", f"{node.base}/link")
        text = Path(node.config).read_text()
        for directory in (node.root, node.state):
            text = text.replace(f'"{directory}"', f'"{node.base}/link/{os.path.basename(directory)}"')
        Path(node.config).write_text(text)
        node.start()
        import_image(node, busybox_archive)
        pod = node.run_pod("linked")
        volume = cri.Mount(container_path="/vol", readonly=True, image=cri.ImageSpec(image="localhost/busybox:latest"))
        exited = node.run(pod, "exited", ["true"], mounts=[volume])
        node.wait(exited)
        node.client.RemoveContainer(container_id=exited)
        assert exited not in " ".join(mounts.mounts_below(node.base))
        node.run(pod, "running", ["sleep", "1000"], mounts=[volume])
        node.kill()
        done = reset(node, "--yes", "--images", "--grace", "0")
        assert done.returncode == 0, done.stderr
        assert traces(node) == []
    finally:
        node.close()
