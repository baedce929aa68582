"""The daemon itself: its socket, its lock, its stop, and what it finds after it was killed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import host
from tests.support.frozen_disk import UNTYPED, give_disk
from tests.support.node import DRIVER, NETWORK, UNTIL_GO, Node, filled, go, processes
from tests.support.waiting import SLOWNESS, eventually, within


def test_the_socket_is_roots_alone(node: Node) -> None:
    assert stat.S_IMODE(os.stat(node.socket).st_mode) == 0o600


def test_a_second_daemon_on_the_same_directories_is_refused(node: Node) -> None:
    command = [sys.executable, "-m", "criserver", "serve", "--config", node.config]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    assert second.returncode == 1
    assert node.process is not None
    assert f"another criserver (PID {node.process.pid}) uses {node.root}" in second.stderr
    node.client.Version()


def test_a_file_system_without_types_in_lists_is_refused(nothing_left: None) -> None:
    node = Node()
    try:
        give_disk(node, "", 64 << 20, *UNTYPED)
        command = [sys.executable, "-m", "criserver", "serve", "--config", node.config]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    finally:
        node.close()
    assert refused.returncode == 1
    assert "the daemon cannot start: lists of directories do not have the types of files" in refused.stderr
    assert f"file system of {node.root}/snapshots" in refused.stderr


def has_logged(node: Node, container: str, text: str) -> bool:
    return len(node.log(container)) >= len(text)


def test_a_record_that_would_be_refused_today_is_read_and_its_container_goes_on(node: Node) -> None:
    """As from another kernel or release: unified limits on cgroup v1, both kinds of user, a number of a later CRI."""
    container = node.run(node.run_pod("older"), "c", ["sleep", "1000"])
    pid = node.pid(container)

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        sent = cri.ContainerConfig.FromString(base64.b64decode(fields["sent"]))
        sent.linux.resources.unified["memory.high"] = "max"
        sent.linux.security_context.run_as_user.value = 0
        sent.linux.security_context.run_as_username = "root"
        later: Any = 999
        sent.stop_signal = later
        del fields["version"]
        return {**fields, "sent": base64.b64encode(sent.SerializeToString()).decode()}

    node.kill()
    node.rewrite("containers", container, change)
    node.start()
    status = node.status(container)
    assert (status.state, node.pid(container)) == (cri.CONTAINER_RUNNING, pid)
    assert dict(status.resources.linux.unified) == {"memory.high": "max"}
    assert node.client.ListContainers().containers[0].id == container
    node.client.StopContainer(container_id=container, timeout=0)
    assert node.wait(container).exit_code == 137


def test_a_record_of_a_newer_release_keeps_the_daemon_from_starting_and_its_container_running(node: Node) -> None:
    container = node.run(node.run_pod("newer"), "c", ["sleep", "1000"])
    pid = node.pid(container)
    node.kill()
    node.rewrite("containers", container, lambda fields: {**fields, "version": 99})
    command = [sys.executable, "-m", "criserver", "serve", "--config", node.config]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    os.kill(pid, signal.SIGCONT)
    node.rewrite("containers", container, lambda fields: {**fields, "version": 1})
    node.start()
    assert refused.returncode == 1
    assert f"the record {container} of containers is of version 99" in refused.stderr
    words = "start that one again. To go back to this one, first take the node's pods down with the newer one's"
    assert words in refused.stderr
    assert node.pid(container) == pid


def test_status_and_version(node: Node) -> None:
    version = node.client.Version()
    assert (version.runtime_name, version.runtime_api_version) == ("criserver", "v1")
    status = node.client.Status(verbose=True)
    assert {c.type: c.status for c in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert {h.name for h in status.runtime_handlers} == {"", "runc"}
    driver = cri.SYSTEMD if DRIVER == "systemd" else cri.CGROUPFS
    assert node.client.RuntimeConfig().linux.cgroup_driver == driver
    info = json.loads(status.info["info"])
    assert info["cgroupDriver"] == DRIVER
    assert json.loads(status.info["config"])["cni"]["confDir"] == node.cni
    assert json.loads(status.info["cniconfig"])["Networks"][0]["Config"]["Name"] == NETWORK
    assert status.info["lastCNILoadStatus"] == "OK"
    assert info["defaultAppArmorProfile"] == (None if host.apparmor_profiles() is None else "criserver-default")


def test_containers_have_the_limit_of_descriptors_that_the_daemon_was_started_with(node: Node) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    node.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (700, hard))
    try:
        node.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert node.process is not None
    assert resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    container = node.run(node.run_pod("limits"), "c", ["sleep", "1000"])
    # Of its first process: runc 1.1.5 raises the limit of those that are started later.
    assert node.sh(container, "grep files /proc/1/limits").split()[3:5] == ["700", str(hard)]
    node.kill()
    node.start()


@pytest.fixture
def pings(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Has the node's daemon ping a watchdog five times a second; call it for how many pings have come since."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        node.stop()
        node.start()

        def count() -> int:
            found = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    found += b"WATCHDOG=1" in manager.recv(4096)
            return found

        yield count
        monkeypatch.undo()
        node.stop()
        node.start()


def faults(node: Node, since: int) -> list[str]:
    """Events of warnings and errors in the daemon's log from so many lines on."""
    lines = [json.loads(line) for line in node.daemon_log().splitlines()[since:] if line.startswith("{")]
    return [line["event"] for line in lines if line["level"] in ("warning", "error")]


def test_a_daemon_that_has_had_no_descriptors_left_goes_on(node: Node, pings: Callable[[], int]) -> None:
    assert node.process is not None
    pid, before = node.process.pid, len(node.daemon_log().splitlines())
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # The first three are always open, so it gets none. Of the others some may be open for a moment only.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        eventually(lambda: faults(node, before))
        pings()
        time.sleep(1)  # several pings would have come
        assert pings() == 0
        node.client.Version()
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    eventually(lambda: pings() > 0)
    assert faults(node, before) == ["the service manager cannot be notified"]
    container = node.run(node.run_pod("after"), "c", ["sleep", "1000"])
    eventually(lambda: measured(node, container))


def test_a_start_that_fails_for_want_of_descriptors_is_ended_once_there_are_some(node: Node) -> None:
    assert node.process is not None
    pid = node.process.pid
    container = node.create(node.run_pod("short"), "c", ["sleep", "1000"], log_path="")
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(grpc.RpcError, match="no file descriptors left") as refused:
            node.client.StartContainer(container_id=container)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    eventually(lambda: node.status(container).state == cri.CONTAINER_EXITED)
    assert node.status(container).reason == "StartError"


@pytest.mark.skipif(not os.path.isdir("/sys/fs/cgroup/pids"), reason="the pids controller of cgroup version 1")
def test_a_daemon_that_could_start_no_process_and_no_thread_goes_on(node: Node, pings: Callable[[], int]) -> None:
    assert node.process is not None
    container = node.run(node.run_pod("before"), "c", ["sleep", "1000"])
    groups = (line.split(":", 2) for line in Path(f"/proc/{node.process.pid}/cgroup").read_text().splitlines())
    home = Path("/sys/fs/cgroup/pids" + next(path for _, kind, path in groups if kind == "pids"))
    full = home / f"criserver-test-{os.getpid()}"
    full.mkdir()
    try:
        # The daemon alone: its nursery and what that forks stay outside.
        (full / "cgroup.procs").write_text(str(node.process.pid))
        (full / "pids.max").write_text("1")  # less than it has: the end of one of its threads makes no room either
        pings()
        for number in range(3):
            node.client.Version()
            with pytest.raises(grpc.RpcError, match="no process or thread can be started now: TasksMax") as refused:
                node.run_pod(f"refused{number}")
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert node.sh(container, "echo still here") == "still here\n"
        eventually(lambda: pings() > 0)
        node.client.StopContainer(container_id=container, timeout=0)
    finally:
        (home / "cgroup.procs").write_text(str(node.process.pid))
        full.rmdir()
    assert node.process.poll() is None
    later = node.run(node.run_pod("after"), "c", ["sleep", "1000"])
    eventually(lambda: measured(node, later))
    pings()
    eventually(lambda: pings() > 0)


def measured(node: Node, container: str) -> bool:
    """Whether the writable layer of a container has been measured."""
    stats = node.client.ContainerStats(container_id=container).stats
    return bool(stats.writable_layer.inodes_used.value)


def test_an_orderly_stop_leaves_the_containers_running(node: Node) -> None:
    pod = node.run_pod("calm")
    container = node.run(pod, "c", ["sh", "-c", "while :; do echo tick; sleep 0.02; done"])
    assert node.stop() == 0
    assert not os.path.exists(node.socket) or stat.S_ISSOCK(os.stat(node.socket).st_mode)
    path = f"{node.logs}/calm/c.log"
    size = os.path.getsize(path)
    eventually(lambda: os.path.getsize(path) > size)
    node.start()
    assert node.status(container).state == cri.CONTAINER_RUNNING
    assert node.sh(container, "echo still here") == "still here\n"


def test_a_strict_umask_and_a_mount_whose_name_is_in_another_encoding(node: Node) -> None:
    """As on a hardened node, and with a disk of another system. The daemon reads the list of mounts at its start."""
    node.stop()
    volume = f"{node.base}/made-by-the-daemon"
    point = os.fsencode(node.base) + b"/disk-\xe9"
    os.mkdir(point)
    subprocess.run(["mount", "-t", "tmpfs", "cri-e2e", point], check=True)
    try:
        mask = os.umask(0o077)
        try:
            node.start()
        finally:
            os.umask(mask)
        mount = cri.Mount(container_path="/volume", host_path=volume)
        container = node.run(node.run_pod("strict"), "c", ["echo", "ran"], mounts=[mount])
        assert node.wait(container).exit_code == 0
        assert [oct(stat.S_IMODE(os.stat(path).st_mode)) for path in (volume, f"{node.logs}/strict")] == ["0o755"] * 2
        command = [sys.executable, "-m", "criserver", "check", "--config", node.config]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
        assert "Traceback" not in checked.stderr
        assert "cgroup version" in checked.stdout
    finally:
        subprocess.run(["umount", point], check=True)
        os.rmdir(point)


def test_ten_pods_survive_a_killed_daemon_and_an_exit_meanwhile_is_not_lost(node: Node) -> None:
    script = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo $i; sleep 0.01; done; "
    pods = [node.run_pod(f"pod-{n}") for n in range(10)]
    containers = [
        node.run(pods[n], "c", ["sh", "-c", script + ("exit 42" if n == 3 else "exec sleep 1000")]) for n in range(10)
    ]
    before = {p.id: p for p in node.client.ListPodSandbox().items}
    running = {c.id: node.status(c.id) for c in node.client.ListContainers().containers}
    node.kill()
    exit_record = f"{node.state}/containers/{containers[3]}/exit.json"
    eventually(lambda: os.path.exists(exit_record))
    node.start()
    assert {p.id: p for p in node.client.ListPodSandbox().items} == before
    for n, container in enumerate(containers):
        status = node.status(container)
        if n == 3:
            assert (status.state, status.exit_code) == (cri.CONTAINER_EXITED, 42)
            assert status.started_at == running[container].started_at
            assert status.finished_at > status.started_at
        else:
            assert status == running[container]
            assert node.sh(container, "echo alive") == "alive\n"
    whole = "".join(f"{n}\n" for n in range(1, 201))
    for container in containers:
        eventually(partial(has_logged, node, container, whole))
        assert node.log(container) == whole
    for container in containers:
        node.client.StopContainer(container_id=container, timeout=0)
        assert node.status(container).exit_code == (42 if container == containers[3] else 137)


def test_the_shared_pid_namespace_survives_a_killed_daemon(node: Node) -> None:
    options = cri.NamespaceOption(pid=cri.POD)
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))
    pod = node.run_pod("pids", linux=linux)
    one = node.run(pod, "one", ["sleep", "1000"])
    node.kill()
    node.start()
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
    two = node.run(pod, "two", ["sleep", "1000"])
    assert node.sh(one, "readlink /proc/self/ns/pid") == node.sh(two, "readlink /proc/self/ns/pid")


def test_a_container_whose_shim_was_killed_is_watched_and_ends_as_unknown(node: Node) -> None:
    pod = node.run_pod("shimless")
    container = node.run(pod, "c", ["sleep", "1000"])
    shim = next(
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal() and _cwd(pid) == f"{node.state}/containers/{container}"
    )
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: "a container's shim is gone" in node.daemon_log())
    assert node.status(container).state == cri.CONTAINER_RUNNING
    with pytest.raises(grpc.RpcError, match="runs, but its shim is gone or cannot be reached"):
        node.client.ReopenContainerLog(container_id=container)
    node.client.StopContainer(container_id=container, timeout=0)
    ended = node.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (cri.CONTAINER_EXITED, 255, "Unknown")


def test_frozen_shims_do_not_delay_lists_and_stops(node: Node) -> None:
    pod = node.run_pod("frozen")
    containers = [node.run(pod, f"c{n}", ["sleep", "1000"]) for n in range(5)]
    directories = {f"{node.state}/containers/{c}" for c in containers}
    shims = [int(p) for p in os.listdir("/proc") if p.isdecimal() and _cwd(p) in directories]
    assert len(shims) == 5
    try:
        for shim in shims:
            os.kill(shim, signal.SIGSTOP)
        with within(9.5):  # a shim has 10 s to answer
            assert len(node.client.ListContainers().containers) == 5
            for container in containers:
                node.status(container)
        node.kill()
        node.start()
        assert {node.status(c).state for c in containers} == {cri.CONTAINER_RUNNING}
    finally:
        for shim in shims:
            os.kill(shim, signal.SIGCONT)


def test_an_orderly_stop_invents_no_exit_code(node: Node) -> None:
    pod = node.run_pod("exact")
    begin = len(node.daemon_log())
    # The grandchild keeps the log's pipe open, so that the shim is still draining it when the daemon goes.
    container = node.run(pod, "c", ["sh", "-c", f"{UNTIL_GO}; (trap '' HUP; sleep 3) & exit 7"])
    pid = node.pid(container)
    go(pid)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    assert node.stop() == 0
    eventually(lambda: os.path.exists(f"{node.state}/containers/{container}/exit.json"))
    node.start()
    ended = node.wait(container)
    assert (ended.exit_code, ended.reason) == (7, "Error")
    assert "shim is gone" not in node.daemon_log()[begin:]


def test_nobody_but_root_sees_what_containers_are_given(node: Node) -> None:
    pod = node.run_pod("secret")
    container = node.run(pod, "c", ["sleep", "1000"], envs=[cri.KeyValue(key="PASSWORD", value=b"hunter2")])
    directory = f"{node.state}/containers/{container}"
    os.chmod(node.base, 0o755)
    try:
        for tried in (
            f"cat {directory}/config.json",
            f"ls {directory}",
            f"ls {node.state}/containers",
            f"{directory}/rootfs/bin/true",
            f"cat {node.root}/criserver.db",
        ):
            # By a shell: setpriv itself still has its capabilities when it looks the program up.
            command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", tried]
            assert subprocess.run(command, capture_output=True).returncode != 0, tried
    finally:
        os.chmod(node.base, 0o700)


def test_a_container_whose_shim_is_frozen_can_be_stopped_and_removed(node: Node) -> None:
    pod = node.run_pod("stuck")
    container = node.run(pod, "c", ["sleep", "1000"])
    (shim,) = (int(p) for p in os.listdir("/proc") if p.isdecimal() and _cwd(p).endswith(container))
    os.kill(shim, signal.SIGSTOP)
    with within(25):  # without a look at the shim it would take 30 s
        node.client.StopContainer(container_id=container, timeout=0)
    ended = node.status(container)
    assert (ended.state, ended.exit_code) == (cri.CONTAINER_EXITED, 137)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    eventually(lambda: not os.path.exists(f"/proc/{shim}"))  # the nursery reaps it


def test_a_shared_pid_namespace_that_is_gone_is_not_replaced_by_another(node: Node) -> None:
    options = cri.NamespaceOption(pid=cri.POD)
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))
    pod = node.run_pod("pids", linux=linux)
    with open(f"{node.state}/containers/{pod}/init.pid") as f:
        infra = int(f.read())
    (shim,) = (int(p) for p in os.listdir("/proc") if p.isdecimal() and _cwd(p).endswith(pod))
    os.kill(shim, signal.SIGKILL)
    os.kill(infra, signal.SIGKILL)
    eventually(lambda: node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_NOTREADY)
    with pytest.raises(grpc.RpcError) as e:
        node.create(pod, "late", ["true"])
    assert e.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_full_disk_loses_no_exit_and_can_be_freed(node: Node) -> None:
    pod = node.run_pod("full")
    container = node.run(pod, "c", ["sleep", "1000"])
    with filled(node.root):
        node.client.StopContainer(container_id=container, timeout=0)
        assert node.status(container).exit_code == 137
        node.client.StopPodSandbox(pod_sandbox_id=pod)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)


def test_a_full_state_directory_loses_no_exit_and_can_be_freed(node: Node) -> None:
    """Here the daemon's log is full too."""
    pod = node.run_pod("full")
    stopped, ended = node.run(pod, "stopped", ["sleep", "1000"]), node.run(pod, "ended", ["sleep", "1000"])
    with filled(node.base):
        node.client.StopContainer(container_id=stopped, timeout=0)
        assert node.status(stopped).exit_code == 137
        pid = node.pid(ended)
        node.kill()
        os.kill(pid, signal.SIGKILL)
        node.start()
        assert node.wait(ended).exit_code == 137
        node.client.RemoveContainer(container_id=ended)
        assert not os.path.exists(f"{node.state}/containers/{ended}")
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
        assert node.settled() == []


@contextlib.contextmanager
def plugin_under_way(node: Node, name: str, cases: str, begun: str) -> Iterator[None]:
    """A pod is being made with a network plugin of this shell script's cases, which has made the file ``begun``."""
    os.makedirs(f"{node.base}/bin", exist_ok=True)
    with open(f"{node.base}/bin/{name}", "w") as f:
        f.write(
            f"#!/bin/sh\ncat >/dev/null\ncase $CNI_COMMAND in\n{cases}\nesac\n"
            'echo \'{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/24"}]}\'\n'
        )
        os.fchmod(f.fileno(), 0o755)
    with open(f"{node.cni}/05-{name}.conflist", "w") as f:
        json.dump({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": name}]}, f)

    def run() -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):
            node.client.RunPodSandbox(config=node.pod(name))

    caller = threading.Thread(target=run)
    try:
        caller.start()
        eventually(lambda: os.path.exists(begun))
        yield
    finally:
        caller.join()
        os.unlink(f"{node.cni}/05-{name}.conflist")


def test_a_pod_that_cannot_be_rolled_back_at_the_start_can_be_removed_and_made_again(node: Node) -> None:
    done, begun = f"{node.base}/refusing.done", f"{node.base}/refusing.begun"
    cases = f"ADD) [ -e {done} ] || {{ touch {begun}; sleep 60; }};;\nDEL) [ -e {done} ] || exit 1;;"
    with plugin_under_way(node, "refusing", cases, begun):
        node.kill()
        node.start()
        (pod,) = node.client.ListPodSandbox().items
        assert pod.state == cri.SANDBOX_NOTREADY
        with open(done, "w"):
            pass
        node.client.StopPodSandbox(pod_sandbox_id=pod.id)
        node.client.RemovePodSandbox(pod_sandbox_id=pod.id)
        again = node.client.RunPodSandbox(config=node.pod("refusing")).pod_sandbox_id
        node.client.RemovePodSandbox(pod_sandbox_id=again)
        assert node.client.ListPodSandbox().items == []


def test_a_plugin_that_outlives_the_daemon_is_waited_for_before_its_work_is_undone(node: Node) -> None:
    lease = f"{node.base}/lease"
    waiting = f"while [ ! -e {lease}.go ]; do sleep 0.05; done"
    cases = f"ADD) touch {lease}.begun; {waiting}; touch {lease};;\nDEL) rm -f {lease};;"
    with plugin_under_way(node, "slow", cases, f"{lease}.begun"):
        node.kill()
        begin = len(node.daemon_log())
        node.start(recovered=False)
        eventually(lambda: "rolling back a pod sandbox" in node.daemon_log()[begin:])
        assert not os.path.exists(lease)
        Path(f"{lease}.go").touch()
        eventually(lambda: '"recovered"' in node.daemon_log()[begin:])
        eventually(lambda: not [words for _, words in processes() if f"{node.base}/bin/slow" in words])
        assert not os.path.exists(lease)
        assert node.client.ListPodSandbox().items == []


@pytest.mark.parametrize("seed", range(12))
def test_a_daemon_killed_at_any_moment_leaves_nothing_without_an_owner(node: Node, seed: int) -> None:
    moment = random.Random(seed).uniform(0.0, 0.35)

    def work() -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):
            pod = node.run_pod(f"victim-{seed}")
            container = node.run(pod, "c", ["sleep", "1000"])
            node.client.ExecSync(container_id=container, cmd=["true"], timeout=5)
            node.client.StopPodSandbox(pod_sandbox_id=pod)
            node.client.RemovePodSandbox(pod_sandbox_id=pod)

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(moment)
    node.kill()
    worker.join()
    node.start()
    pods = {p.id for p in node.client.ListPodSandbox().items}
    containers = {c.id: c for c in node.client.ListContainers().containers}
    assert {c.pod_sandbox_id for c in containers.values()} <= pods
    for directory, owners in (("ns", pods), ("sandboxes", pods), ("containers", set(containers))):
        with contextlib.suppress(FileNotFoundError):
            assert set(os.listdir(f"{node.state}/{directory}")) <= owners, directory
    node.remove_pods()
    assert node.settled() == []


def _cwd(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
