"""Starts and commands that hang, because of an image, a hook or an OCI runtime: calls end in time, and nothing is left.

What hangs is real wherever that can be had: the OCI runtime opens the container's /etc/passwd, and a FIFO holds it
for as long as nobody writes. Whatever ends it, neither a process nor anything else that was half made is left.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, pidfd
from tests.support.fixtures import serving
from tests.support.freezer import Freezer, freezer
from tests.support.node import RUNTIME, Node, cgroup, processes, refused
from tests.support.streaming_client import Spdy
from tests.support.waiting import SLOWNESS, eventually, within

__all__ = ["freezer"]

# Seconds. Neither a start's 100 s nor a command's 60 s, and not the 10 s of a request to a shim that is stuck.
SOON = 9.5
SLEEP = ["sleep", "1000"]
# Whatever a test has that sleeps for so long was started by what hangs.
MARK = f"86{os.getpid() % 1000:03}"
SHARED = cri.LinuxPodSandboxConfig(
    security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD))
)

# Hangs in the commands of the OCI runtime that have a file here: before it comes to it, or when it is done.
WRAPPER = """#!/bin/sh
for word; do case $word in run|exec|delete) break ;; esac; done
if [ -e {directory}/$word ]; then
    setsid sleep {mark} &
    [ -s {directory}/$word ] && {runtime} "$@"
    sleep {mark}
fi
exec {runtime} "$@"
"""


class Hanging:
    """The commands of the OCI runtime that hang."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "wrapper"
        self.path.write_text(WRAPPER.format(directory=directory, mark=MARK, runtime=RUNTIME))
        self.path.chmod(0o755)

    def hang(self, command: str, *, afterwards: bool = False) -> None:
        (self.directory / command).write_text("afterwards" if afterwards else "")

    def stop(self) -> None:
        for command in ("run", "exec", "delete"):
            (self.directory / command).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Hanging:
    return Hanging(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, wrapper: Hanging) -> Iterator[Node]:
    """A daemon whose OCI runtime can be made to hang."""
    with serving(busybox_archive, f'[runtimes.runc]\npath = "{wrapper.path}"\n') as node:
        yield node


@pytest.fixture(autouse=True)
def nothing_hangs(wrapper: Hanging) -> Iterator[None]:
    yield
    wrapper.stop()
    assert asleep() == []


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def asleep() -> list[str]:
    """What was started by something that hangs, and is there still."""
    return [f"{pid} {words}" for pid, words in processes() if f"sleep {MARK} " in words]


def fifo_mount(tmp_path: Path) -> list[cri.Mount]:
    """A read of this /etc/passwd does not return. The OCI runtime reads it in the container that it is making."""
    path = tmp_path / "passwd"
    os.mkfifo(path)
    return [cri.Mount(container_path="/etc/passwd", host_path=str(path))]


def hook(node: Node, *argv: str) -> list[cri.CDIDevice]:
    """A hook of a device: it runs before the OCI runtime has written anything down of the container."""
    document = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/hanging",
        "devices": [
            {
                "name": "0",
                "containerEdits": {"hooks": [{"hookName": "createRuntime", "path": argv[0], "args": list(argv)}]},
            }
        ],
    }
    Path(node.base, "cdi", "hanging.json").write_text(json.dumps(document))
    return [cri.CDIDevice(name="vendor.com/hanging=0")]


def begun(node: Node, pod: str, container: str) -> None:
    """Wait until the OCI runtime has made a process for the container, which is not let go of."""
    eventually(lambda: cgroups.processes(cgroup(pod, container)))


def half_made(node: Node, pod: str, container: str) -> list[str]:
    """What there is of a container beside its record and its files."""
    found = [str(pid) for pid in pidfd.processes_in(f"{node.state}/containers/{container}")]
    found += [root + cgroup(pod, container) for root in cgroups.roots().values()]
    found += glob.glob(f"{node.state}/runtimes/*/{container}")
    return [thing for thing in found if thing.isdecimal() or os.path.exists(thing)] + asleep()


def ended(node: Node, pod: str, container: str, start: Future[Any]) -> None:
    """A start that was ended by a stop, as its caller and the kubelet are to see it."""
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "cannot be started", "stopped before its process ran"):
        start.result(SOON * SLOWNESS)
    status = node.status(container)
    assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 128, "StartError")
    assert "stopped before its process ran" in status.message
    assert half_made(node, pod, container) == []
    with within(SOON):
        node.client.RemoveContainer(container_id=container)


CALLS: dict[str, Callable[[Node, str, str], None]] = {
    "StopContainer": lambda node, _, container: node.client.StopContainer(container_id=container, timeout=0),
    "StopContainer with a grace": lambda node, _, c: node.client.StopContainer(container_id=c, timeout=30),
    "StopPodSandbox": lambda node, pod, _: node.client.StopPodSandbox(pod_sandbox_id=pod),
    "RemoveContainer": lambda node, _, container: node.client.RemoveContainer(container_id=container),
    "RemovePodSandbox": lambda node, pod, _: node.client.RemovePodSandbox(pod_sandbox_id=pod),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_start_that_hangs_ends_with_a_stop(node: Node, pool: ThreadPoolExecutor, tmp_path: Path, call: str) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    begun(node, pod, container)
    with within(SOON):
        CALLS[call](node, pod, container)
    if call.startswith("Stop"):
        ended(node, pod, container, start)
    else:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "stopped before its process ran"):
            start.result(SOON * SLOWNESS)
        assert container not in {c.id for c in node.client.ListContainers().containers}
    assert half_made(node, pod, container) == []


@pytest.mark.parametrize("session", [False, True], ids=["in the runtime's session", "in a session of its own"])
def test_a_start_whose_hook_hangs(node: Node, pool: ThreadPoolExecutor, *, session: bool) -> None:
    pod = node.run_pod()
    argv = ["/usr/bin/setsid", "sleep", MARK] if session else ["/bin/sleep", MARK]
    container = node.create(pod, "c", SLEEP, CDI_devices=hook(node, *argv))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    eventually(asleep)
    with within(SOON):
        node.client.StopContainer(container_id=container, timeout=10)
    ended(node, pod, container, start)


@pytest.mark.parametrize("afterwards", [False, True], ids=["before", "after"])
def test_a_start_whose_runtime_hangs(
    node: Node, pool: ThreadPoolExecutor, wrapper: Hanging, *, afterwards: bool
) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP)
    wrapper.hang("run", afterwards=afterwards)
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    eventually(lambda: len(asleep()) == 2)
    with within(SOON):
        node.client.StopContainer(container_id=container, timeout=10)
    ended(node, pod, container, start)


def test_a_start_that_was_frozen(node: Node, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    begun(node, pod, container)
    cgroups.freeze(cgroup(pod, container), time.sleep)
    with within(SOON):
        node.client.StopContainer(container_id=container, timeout=10)
    ended(node, pod, container, start)


def test_a_start_whose_shim_is_stopped(node: Node, pool: ThreadPoolExecutor, tmp_path: Path, freezer: Freezer) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    begun(node, pod, container)
    freezer.freeze(container)
    with within(SOON):
        node.client.StopContainer(container_id=container, timeout=10)
    ended(node, pod, container, start)


def test_a_start_whose_shim_was_killed(node: Node, pool: ThreadPoolExecutor, tmp_path: Path, freezer: Freezer) -> None:
    """The OCI runtime that it was running has nobody any more who would give it up."""
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    begun(node, pod, container)
    freezer.freeze(container)
    os.kill(freezer.stopped[container], signal.SIGKILL)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "shim ended before the container had started"):
        start.result(SOON * SLOWNESS)
    assert half_made(node, pod, container) == []


def test_a_stop_at_any_moment_of_a_start_that_does_not_hang(node: Node, pool: ThreadPoolExecutor) -> None:
    """Before it, in it, after it: either it was ended, or its process ran and was killed; never anything else."""
    pod = node.run_pod()
    for moment in range(16):
        container = node.create(pod, f"c{moment}", SLEEP)
        start = pool.submit(node.client.StartContainer, container_id=container)
        time.sleep(0.003 * moment)
        with within(SOON):
            node.client.StopContainer(container_id=container, timeout=0)
        failure = start.exception(SOON * SLOWNESS)
        status = node.status(container)
        if status.state == cri.CONTAINER_RUNNING:  # the stop came before the start
            assert failure is None
        else:
            assert status.state == cri.CONTAINER_EXITED
            expected = ("Error", 137) if failure is None else ("StartError", 128)
            assert (status.reason, status.exit_code) == expected
        with within(SOON):
            node.client.RemoveContainer(container_id=container)
        assert half_made(node, pod, container) == []


def test_the_pod_goes_on_beside_a_start_that_hangs(node: Node, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
    begun(node, pod, container)
    with within(SOON):
        other = node.run(pod, "other", SLEEP)
    assert node.sh(other, "echo hello") == "hello\n"
    node.client.StopContainer(container_id=container, timeout=0)
    ended(node, pod, container, start)
    assert node.sh(other, "echo hello") == "hello\n"


@pytest.mark.parametrize("call", CALLS)
def test_a_new_daemon_ends_the_start_of_an_earlier_one(node: Node, tmp_path: Path, call: str) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
        begun(node, pod, container)
        node.kill()
        with pytest.raises(grpc.RpcError):
            start.result(SOON * SLOWNESS)
    with within(3 * SOON):
        node.start()
    assert node.status(container).state == cri.CONTAINER_CREATED
    with within(SOON):
        CALLS[call](node, pod, container)
    assert half_made(node, pod, container) == []
    if call.startswith("Stop"):
        status = node.status(container)
        assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 128, "StartError")
        with within(SOON):
            node.client.RemoveContainer(container_id=container)


def test_a_new_daemon_finds_the_runtime_of_a_start_without_its_shim(
    node: Node, tmp_path: Path, freezer: Freezer
) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", SLEEP, mounts=fifo_mount(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(node.client.StartContainer, container_id=container, deadline=130)
        begun(node, pod, container)
        freezer.freeze(container)
        node.kill()
        os.kill(freezer.stopped[container], signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            start.result(SOON * SLOWNESS)
    with within(3 * SOON):
        node.start()
    assert node.status(container).reason == "StartError"
    assert half_made(node, pod, container) == []


def test_a_pod_whose_infra_process_hangs_is_rolled_back_by_a_new_daemon(node: Node, wrapper: Hanging) -> None:
    wrapper.hang("run")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(node.client.RunPodSandbox, config=node.pod(linux=SHARED), deadline=130)
        eventually(lambda: len(asleep()) == 2)
        node.kill()
        with pytest.raises(grpc.RpcError):
            run.result(SOON * SLOWNESS)
    with within(3 * SOON):
        node.start()
    assert node.settled() == []
    assert asleep() == []
    wrapper.stop()
    # What a kubelet does next: the same pod again.
    assert node.run_pod(linux=SHARED)


def test_a_pod_whose_infra_process_hangs_can_be_stopped_by_who_knows_its_name(
    node: Node, pool: ThreadPoolExecutor, wrapper: Hanging
) -> None:
    wrapper.hang("run")
    run = pool.submit(node.client.RunPodSandbox, config=node.pod(linux=SHARED), deadline=130)
    eventually(lambda: len(asleep()) == 2)
    assert node.client.ListPodSandbox().items == []
    [pod] = os.listdir(f"{node.state}/containers")
    with within(SOON):
        node.client.StopPodSandbox(pod_sandbox_id=pod)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "stopped before its process ran"):
        run.result(SOON * SLOWNESS)
    assert asleep() == []
    assert node.settled() == []


# Commands


def exec_processes(node: Node, container: str) -> list[str]:
    """The OCI runtime's own processes in a command of a container."""
    return [f"{pid} {words}" for pid, words in processes() if " exec " in words and container in words]


def inside(pod: str, container: str) -> set[int]:
    return set(cgroups.processes(cgroup(pod, container)))


@pytest.fixture
def trap(node: Node) -> tuple[str, str]:
    """A pod and a container that has put a FIFO where the OCI runtime looks for its users: each command hangs."""
    pod = node.run_pod()
    container = node.run(pod, "c", ["sh", "-c", "rm -f /etc/passwd; mkfifo /etc/passwd; echo up; exec sleep 1000"])
    eventually(lambda: node.log(container) == "up\n")
    return pod, container


def timed_out(node: Node, container: str, **fields: Any) -> None:
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "command 'true'", "did not start within 5 s"):
        node.client.ExecSync(container_id=container, cmd=["true"], timeout=1, **fields)


def test_a_command_whose_time_is_up_leaves_nothing(node: Node, trap: tuple[str, str]) -> None:
    pod, container = trap
    before = inside(pod, container)
    with within(5 + SOON):
        timed_out(node, container)
    eventually(lambda: exec_processes(node, container) == [])
    eventually(lambda: inside(pod, container) == before)
    assert node.status(container).state == cri.CONTAINER_RUNNING


def test_a_command_whose_client_has_gone_leaves_nothing(node: Node, trap: tuple[str, str]) -> None:
    pod, container = trap
    before = inside(pod, container)
    with pytest.raises(grpc.RpcError):
        node.client.ExecSync(container_id=container, cmd=["true"], deadline=1)
    eventually(lambda: exec_processes(node, container) == [])
    eventually(lambda: inside(pod, container) == before)


@pytest.mark.parametrize("tty", [False, True])
def test_a_stream_whose_client_has_gone_leaves_nothing(node: Node, trap: tuple[str, str], *, tty: bool) -> None:
    pod, container = trap
    before = inside(pod, container)
    stream = Spdy(node.client.Exec(container_id=container, cmd=["true"], stdout=True, tty=tty).url)
    stream.open_command("error", "stdout", *(["resize"] if tty else []))
    eventually(lambda: len(inside(pod, container)) > len(before))
    stream.close()
    eventually(lambda: exec_processes(node, container) == [])
    eventually(lambda: inside(pod, container) == before)


@pytest.mark.parametrize("afterwards", [False, True], ids=["before", "after"])
def test_a_command_whose_runtime_hangs(node: Node, wrapper: Hanging, *, afterwards: bool) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    before = inside(pod, container)
    wrapper.hang("exec", afterwards=afterwards)
    with within(5 + SOON), refused(grpc.StatusCode.DEADLINE_EXCEEDED, MARK, "did not start within 5 s"):
        node.client.ExecSync(container_id=container, cmd=["sleep", MARK], timeout=1)
    eventually(lambda: asleep() == [])
    eventually(lambda: inside(pod, container) == before)
    wrapper.stop()
    assert node.sh(container, "echo hello") == "hello\n"


def test_a_container_that_ends_takes_its_hanging_commands_along(
    node: Node, wrapper: Hanging, pool: ThreadPoolExecutor
) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    wrapper.hang("exec")
    call = pool.submit(node.client.ExecSync, container_id=container, cmd=["true"])
    eventually(lambda: len(asleep()) == 2)
    wrapper.stop()
    node.client.StopContainer(container_id=container, timeout=0)
    with pytest.raises(grpc.RpcError):
        call.result(SOON * SLOWNESS)
    eventually(lambda: asleep() == [])


def test_a_command_in_a_frozen_container(node: Node) -> None:
    """The container is frozen while the command is being made: nothing of it goes on once it is thawed."""
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    before = inside(pod, container)
    cgroups.freeze(cgroup(pod, container), time.sleep)
    try:
        with within(5 + SOON), pytest.raises(grpc.RpcError):
            node.client.ExecSync(container_id=container, cmd=["touch", "/late"], timeout=1)
        eventually(lambda: exec_processes(node, container) == [])
    finally:
        cgroups.thaw(cgroup(pod, container))
    eventually(lambda: inside(pod, container) == before)
    assert node.sh(container, "ls /late 2>/dev/null || echo none") == "none\n"


def test_a_half_made_process_that_was_frozen(node: Node, trap: tuple[str, str], pool: ThreadPoolExecutor) -> None:
    pod, container = trap
    before = inside(pod, container)
    call = pool.submit(timed_out, node, container)
    eventually(lambda: len(inside(pod, container)) > len(before))
    cgroups.freeze(cgroup(pod, container), time.sleep)
    try:
        call.result(SOON * SLOWNESS)
        # What is frozen with the container takes no signal now.
        eventually(lambda: {int(p.split()[0]) for p in exec_processes(node, container)} <= inside(pod, container))
    finally:
        cgroups.thaw(cgroup(pod, container))
    eventually(lambda: inside(pod, container) == before)


# Targets


def beside(target: str) -> cri.LinuxContainerConfig:
    options = cri.NamespaceOption(pid=cri.TARGET, target_id=target)
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=options))


@contextlib.contextmanager
def process_of_number(pid: int) -> Iterator[None]:
    """A process of the node that has this number, which is free."""
    deadline = time.monotonic() + 60 * SLOWNESS
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", MARK])
        if process.pid == pid:
            break
        process.kill()
        process.wait()
        assert time.monotonic() < deadline, "others are quicker"
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_target_whose_number_another_process_has_taken(node: Node) -> None:
    """The debugger would be among the node's own processes."""
    pod = node.run_pod()
    target = node.run(pod, "target", SLEEP)
    pid = node.pid(target)
    debugger = node.create(pod, "debugger", ["ps", "-o", "args"], linux=beside(target))
    node.client.StopContainer(container_id=target, timeout=0)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    with process_of_number(pid), refused(grpc.StatusCode.FAILED_PRECONDITION, "target", target, "has ended"):
        node.client.StartContainer(container_id=debugger)
    status = node.status(debugger)
    assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 128, "StartError")
    assert "has ended" in status.message


def test_the_namespace_of_a_target_is_kept_by_a_pin_and_not_by_a_number(node: Node) -> None:
    pod = node.run_pod()
    target = node.run(pod, "target", SLEEP)
    own = os.stat(f"/proc/{node.pid(target)}/ns/pid").st_ino
    debugger = node.create(pod, "debugger", SLEEP, linux=beside(target))
    directory = f"{node.state}/containers/{debugger}"
    document = json.loads(Path(directory, "config.json").read_text())
    [path] = [n["path"] for n in document["linux"]["namespaces"] if n["type"] == "pid"]
    assert path.startswith(directory)
    assert os.stat(path).st_ino == own
    # It stays over a daemon's end, and goes with the container's own.
    node.kill()
    node.start()
    assert os.stat(path).st_ino == own
    node.client.StartContainer(container_id=debugger)
    assert "sleep 1000" in node.sh(debugger, "ps -o args")
    assert os.stat(f"/proc/{node.pid(debugger)}/ns/pid").st_ino == own
    node.client.StopContainer(container_id=debugger, timeout=0)
    eventually(lambda: os.stat(path).st_ino != own)
    node.client.RemoveContainer(container_id=debugger)
    assert not os.path.exists(directory)


def test_a_container_that_was_never_started_lets_go_of_its_targets_namespace(node: Node) -> None:
    pod = node.run_pod()
    target = node.run(pod, "target", SLEEP)
    debugger = node.create(pod, "debugger", SLEEP, linux=beside(target))
    node.client.RemoveContainer(container_id=debugger)
    assert not os.path.exists(f"{node.state}/containers/{debugger}")
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        assert debugger not in f.read()


def test_a_target_leads_into_the_nodes_namespace_only_where_its_pod_is_in_there(node: Node) -> None:
    host_pids = cri.NamespaceOption(pid=cri.NODE)
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=host_pids))
    pod = node.run_pod()
    target = node.run(pod, "target", SLEEP, linux=linux)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, target, "node's PID namespace"):
        node.create(pod, "debugger", SLEEP, linux=beside(target))
    assert [c.id for c in node.client.ListContainers().containers] == [target]
    security = cri.LinuxSandboxSecurityContext(namespace_options=host_pids)
    shared = node.run_pod("shared", linux=cri.LinuxPodSandboxConfig(security_context=security))
    target = node.run(shared, "target", SLEEP, linux=linux)
    debugger = node.run(shared, "debugger", SLEEP, linux=beside(target))
    assert os.stat(f"/proc/{node.pid(debugger)}/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino


def test_a_target_in_the_pods_shared_namespace(node: Node) -> None:
    pod = node.run_pod(linux=SHARED)
    target = node.run(pod, "target", SLEEP)
    debugger = node.run(pod, "debugger", SLEEP, linux=beside(target))
    own = {os.stat(f"/proc/{node.pid(c)}/ns/pid").st_ino for c in (target, debugger)}
    assert len(own) == 1
    assert own != {os.stat("/proc/self/ns/pid").st_ino}
