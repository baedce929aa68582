"""CheckpointContainer: what is in the archive, and that the container goes on if the checkpoint fails.

criu has to be as new as the kernel: where the installed one is older, ``make test`` unpacks another, or
CRISERVER_TEST_CRIU names one. Tests of what the daemon does meanwhile use programs in criu's place that hang, fail or
die at will.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from criserver.cli.client import method
from criserver.errors import FailedPreconditionError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.criu import REAL_CRIU, criu_trouble
from tests.support.fixtures import serving
from tests.support.node import GATEWAY, Node, cgroup, refused
from tests.support.waiting import SLOWNESS, eventually, within

COUNTER = "secret=open$((40+2))sesame; i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.01; done"
# Seconds. What waits for a checkpoint that hangs has to wait for a minute.
PROMPT = 20.0
# The head of a loop of a criu that waits, but not when it is asked whether it can work.
UNTIL = 'until [ "$1" = check ] ||'
HANGS = '[ "$1" = check ] || sleep 1000'
DIES = '[ "$1" = check ] || { sleep 0.1; kill -9 $$; }'


class Criu:
    """The daemon's criu: the first program of its PATH, which a test may replace at any moment."""

    def __init__(self, directory: Path) -> None:
        self.started = directory / "started"
        self._program = directory / "bin" / "criu"

    def none(self) -> None:
        self._program.unlink(missing_ok=True)
        self.started.unlink(missing_ok=True)

    def script(self, words: str) -> None:
        """A shell script in its place. It leaves a line in ``started`` for each dump that it was started for."""
        self._program.write_text(f'#!/bin/sh\n[ "$1" = check ] || echo $$ >> {self.started}\n{words}\n')
        self._program.chmod(0o755)

    def real(self, before: str = "") -> None:
        """One that can dump, after some words of shell; the test is skipped where there is none."""
        if trouble := criu_trouble():
            pytest.skip(trouble)
        self.script(f'{before}\nexec {REAL_CRIU} "$@"')


@pytest.fixture(scope="module")
def criu_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("criu")
    (directory / "bin").mkdir()
    (directory / "others").mkdir()
    for place in os.environ["PATH"].split(":"):
        for program in os.listdir(place) if os.path.isdir(place) else ():
            if program != "criu" and not os.path.lexists(directory / "others" / program):
                os.symlink(os.path.join(place, program), directory / "others" / program)
    return directory


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, criu_directory: Path) -> Iterator[Node]:
    """A daemon with the programs of this host, but for criu."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{criu_directory}/bin:{criu_directory}/others")
        with serving(busybox_archive) as node:
            yield node


@pytest.fixture
def criu(node: Node, criu_directory: Path) -> Iterator[Criu]:
    """None at first. Nothing that it left at work outlives the test."""
    criu = Criu(criu_directory)
    yield criu
    criu.none()
    for pid in at_work(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def pod(node: Node, criu: Criu) -> str:
    return node.run_pod("pod")


@pytest.fixture
def counter(node: Node, pod: str) -> str:
    """A container that counts."""
    container = node.run(pod, "counter", ["sh", "-c", COUNTER])
    assert_counts(node, container)
    return container


def count(node: Node, container: str) -> int:
    """How far a container has counted, as its writable layer has it: it may be frozen."""
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(Path(f"{node.root}/snapshots/active/{container}/fs/count").read_text())
        time.sleep(0.001)


def assert_counts(node: Node, container: str) -> None:
    """It runs, and goes on from where it was."""
    eventually(Path(f"{node.root}/snapshots/active/{container}/fs/count").exists)
    before = count(node, container)
    eventually(lambda: count(node, container) >= before + 3)
    assert not is_frozen(container_cgroup(node, container))


def container_cgroup(node: Node, container: str) -> str:
    pod = node.client.ListContainers(filter=cri.ContainerFilter(id=container)).containers[0].pod_sandbox_id
    return cgroup(pod, container)


def is_frozen(cgroup: str) -> bool:
    roots = cgroups.roots()
    if "freezer" in roots:
        return Path(f"{roots['freezer']}{cgroup}/freezer.state").read_text() == "FROZEN\n"
    return "frozen 1" in Path(f"{roots['']}{cgroup}/cgroup.events").read_text()


def assert_nothing_left(node: Node, tmp_path: Path) -> None:
    """No process of a checkpoint, none of its directories, no half of an archive."""
    deadline = time.monotonic() + 20 * SLOWNESS
    while found := [*at_work(node), *Path(f"{node.root}/checkpoints").glob("*"), *tmp_path.glob(".checkpoint-*")]:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def at_work(node: Node) -> Iterator[int]:
    """The processes that make a checkpoint."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"CRISERVER_CHECKPOINT={node.root}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                yield int(name)


class Call:
    """A call of CheckpointContainer under way in a thread; ``outcome`` is None or its error."""

    def __init__(self, node: Node, container: str, location: Path, timeout: int = 60) -> None:
        self.outcome: grpc.RpcError | None = None
        self._work = (node, container, location, timeout)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        node, container, location, timeout = self._work
        try:
            node.client.CheckpointContainer(container_id=container, location=str(location), timeout=timeout)
        except grpc.RpcError as e:
            self.outcome = e

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> grpc.RpcError | None:
        self._thread.join(60 * SLOWNESS)
        assert not self._thread.is_alive()
        return self.outcome


def hanging(node: Node, criu: Criu, container: str, location: Path, timeout: int = 60) -> Call:
    """A checkpoint whose criu hangs, and whose container is frozen."""
    criu.script(HANGS)
    call = Call(node, container, location, timeout)
    cgroup = container_cgroup(node, container)
    eventually(lambda: is_frozen(cgroup) and criu.started.exists())
    return call


def given_up(node: Node, criu: Criu, container: str, location: Path) -> None:
    """A checkpoint that goes on after its caller has gone."""
    call = node.client.CheckpointContainer.begin(container_id=container, location=str(location), timeout=60)
    eventually(criu.started.exists)
    assert call.cancel()
    node.client.Version()  # the daemon takes what a client sends in its order


def test_the_archive_has_what_kubernetes_documents(node: Node, criu: Criu, pod: str, tmp_path: Path) -> None:
    criu.real()
    container = node.run(pod, "c", ["sh", "-c", f"echo printed; {COUNTER}"], labels={"a": "b"})
    assert_counts(node, container)
    node.sh(container, "mkdir /new; echo text > '/new/a file'; ln -s /etc /new/link; rm /etc/group; mknod /new/fifo p")
    node.sh(container, "rm -r /root; mkdir /root; chown 7:8 /new; touch /tmp/kept; ln /tmp/kept /tmp/again")
    upper = f"{node.root}/snapshots/active/{container}/fs"
    os.setxattr(f"{upper}/tmp/kept", "user.note", b"\xff\0")
    location = tmp_path / "checkpoint.tar"
    began = time.time_ns()
    node.client.CheckpointContainer(container_id=container, location=str(location), timeout=60)
    assert_counts(node, container)
    assert stat.S_IMODE(location.stat().st_mode) == 0o600
    with tarfile.open(location) as archive:
        names = archive.getnames()
        assert {"checkpoint", "config.dump", "container.log", "deleted.files", "dump.log"} <= set(names)
        assert {"rootfs-diff.tar", "spec.dump", "stats-dump", "status", "checkpoint/inventory.img"} <= set(names)
        config, spec, status, deleted = (
            json.loads(archive.extractfile(name).read())
            for name in ("config.dump", "spec.dump", "status", "deleted.files")
        )
        pages = b"".join(archive.extractfile(name).read() for name in names if "/pages-" in name)
        assert archive.extractfile("container.log").read().endswith(b"stdout F printed\n")
        with tarfile.open(fileobj=archive.extractfile("rootfs-diff.tar")) as diff:
            entries = {entry.name: entry for entry in diff}
            assert diff.extractfile("new/a file").read() == b"text\n"
            assert int(diff.extractfile("count").read()) <= count(node, container)
    assert b"open42sesame" in pages, "the memory of the process is there"
    shown = node.status(container)
    assert (config["id"], config["name"], config["runtime"]) == (container, "c", "runc")
    assert (config["rootfsImageName"], config["rootfsImageRef"]) == ("localhost/busybox:latest", shown.image_ref)
    assert config["checkpointedTime"] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began // 10**9))
    assert spec["annotations"]["io.kubernetes.cri.sandbox-name"] == "pod"
    assert spec["process"]["args"][0] == "sh"
    assert (status["CreatedAt"], status["StartedAt"], status["Pid"] > 0) == (shown.created_at, shown.started_at, True)
    assert deleted == ["/etc/group"]
    assert entries["etc/.wh.group"].size == 0
    assert "root/.wh..wh..opq" in entries, "what the image has in it is not to be seen"
    assert (entries["new"].uid, entries["new"].gid, entries["new/link"].linkname) == (7, 8, "/etc")
    assert entries["new/fifo"].isfifo()
    assert {entries["tmp/kept"].type, entries["tmp/again"].type} == {tarfile.REGTYPE, tarfile.LNKTYPE}
    assert entries["tmp/again"].pax_headers["SCHILY.xattr.user.note"].encode("utf-8", "surrogateescape") == b"\xff\0"
    assert_nothing_left(node, tmp_path)


def test_a_second_checkpoint_replaces_the_first(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    criu.real()
    location = tmp_path / "checkpoint.tar"
    counts = []
    for _ in range(2):
        node.client.CheckpointContainer(container_id=counter, location=str(location))
        with tarfile.open(location) as archive, tarfile.open(fileobj=archive.extractfile("rootfs-diff.tar")) as diff:
            counts.append(int(diff.extractfile("count").read()))
        assert_counts(node, counter)
    assert counts[0] < counts[1]
    assert os.listdir(tmp_path) == ["checkpoint.tar"]


def test_the_containers_of_a_pod_side_by_side(node: Node, criu: Criu, pod: str, tmp_path: Path) -> None:
    criu.real()
    containers = [node.run(pod, f"c{n}", ["sh", "-c", COUNTER]) for n in range(3)]
    for _ in range(4):
        calls = [Call(node, container, tmp_path / f"{n}.tar") for n, container in enumerate(containers)]
        assert [call.wait() for call in calls] == [None] * 3
        for container in containers:
            assert_counts(node, container)
    assert "0% packet loss" in node.sh(containers[0], f"ping -c 1 -W 3 {GATEWAY}")
    rules = ["nsenter", f"--net={node.state}/ns/{pod}/net", "iptables-save"]
    assert "CRIU" not in subprocess.run(rules, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", ["works", "fails"])
def test_callers_that_give_up_and_ask_again_leave_the_container_running(
    node: Node, criu: Criu, counter: str, tmp_path: Path, kind: str
) -> None:
    criu.real() if kind == "works" else criu.script(DIES)
    moments = random.Random(kind)
    before = count(node, counter)
    for _ in range(20):
        with contextlib.suppress(grpc.RpcError):
            node.client.CheckpointContainer(
                deadline=moments.uniform(0.005, 0.4),
                container_id=counter,
                location=str(tmp_path / f"{moments.randrange(2)}.tar"),
                timeout=60,
            )
    assert_counts(node, counter)
    eventually(lambda: count(node, counter) > before + 20)
    assert_nothing_left(node, tmp_path)
    call = Call(node, counter, tmp_path / "last.tar")
    assert (call.wait() is None) == (kind == "works")
    assert_counts(node, counter)


def test_a_caller_that_gives_up_leaves_the_work_to_its_end(
    node: Node, criu: Criu, counter: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    criu.real(before=f"{UNTIL} [ -e {gate} ]; do sleep 0.02; done")
    given_up(node, criu, counter, tmp_path / "c.tar")
    gate.touch()
    eventually((tmp_path / "c.tar").exists)
    assert_counts(node, counter)


def test_a_failure_after_the_caller_gave_up_is_told_in_the_log(
    node: Node, criu: Criu, counter: str, tmp_path: Path
) -> None:
    """And asyncio has nothing to complain of, which is looked at after each test."""
    gate = tmp_path / "gate"
    criu.script(f'{UNTIL} [ -e {gate} ]; do sleep 0.02; done; [ "$1" = check ]')
    given_up(node, criu, counter, tmp_path / "c.tar")
    gate.touch()
    eventually(lambda: "work failed after its caller had gone" in node.daemon_log())
    assert_nothing_left(node, tmp_path)


def test_a_retry_meets_the_attempt_under_way(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    criu.script(f'{UNTIL} [ -e {gate} ]; do sleep 0.02; done; [ "$1" = check ]')
    given_up(node, criu, counter, tmp_path / "c.tar")
    retries = [Call(node, counter, tmp_path / "c.tar") for _ in range(3)]
    with refused(grpc.StatusCode.ALREADY_EXISTS, f"{tmp_path}/c.tar"):
        node.client.CheckpointContainer(container_id=counter, location=f"{tmp_path}/other.tar", timeout=60)
    status = method(node.client.channel, admin.DESCRIPTOR.services_by_name["AdminService"], "NodeStatus")
    eventually(lambda: [c.rpc for c in status(admin.NodeStatusRequest()).calls].count("CheckpointContainer") == 3)
    gate.touch()
    outcomes = {str(retry.wait().details()) for retry in retries}
    assert len(outcomes) == 1
    assert "cannot dump" in outcomes.pop()
    assert len(criu.started.read_text().splitlines()) == 1
    assert_counts(node, counter)


@pytest.mark.parametrize("grace", [0, 50])
def test_a_stop_does_not_wait_for_a_checkpoint(node: Node, criu: Criu, pod: str, tmp_path: Path, grace: int) -> None:
    container = node.run(pod, "c", ["sh", "-c", f"trap 'exit 7' TERM; {COUNTER}"])
    assert_counts(node, container)
    call = hanging(node, criu, container, tmp_path / "c.tar")
    with within(PROMPT):
        node.client.StopContainer(container_id=container, timeout=grace)
    assert node.status(container).exit_code == (7 if grace else 137)
    assert call.wait().code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "cut short" in str(call.outcome.details())
    assert_nothing_left(node, tmp_path)


@pytest.mark.parametrize("rpc", ["RemoveContainer", "StopPodSandbox", "RemovePodSandbox"])
def test_a_removal_does_not_wait_for_a_checkpoint(
    node: Node, criu: Criu, pod: str, counter: str, tmp_path: Path, rpc: str
) -> None:
    call = hanging(node, criu, counter, tmp_path / "c.tar")
    with within(PROMPT):
        getattr(node.client, rpc)(**({"container_id": counter} if "Container" in rpc else {"pod_sandbox_id": pod}))
    assert call.wait().code() is grpc.StatusCode.FAILED_PRECONDITION
    assert_nothing_left(node, tmp_path)


def test_a_container_that_is_being_stopped_is_not_frozen_any_more(
    node: Node, criu: Criu, pod: str, tmp_path: Path
) -> None:
    criu.script(HANGS)
    container = node.run(pod, "deaf", ["sh", "-c", f"trap 'echo told' TERM; {COUNTER}"])
    assert_counts(node, container)
    stop = node.client.StopContainer.begin(container_id=container, timeout=1000)
    eventually(lambda: node.log(container) == "told\n")
    stop.cancel()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "being stopped"):
        node.client.CheckpointContainer(container_id=container, location=f"{tmp_path}/c.tar")
    node.client.StopContainer(container_id=container, timeout=0)
    assert node.wait(container).exit_code == 137


def test_a_container_that_somebody_else_has_frozen_can_be_stopped(node: Node, criu: Criu, counter: str) -> None:
    cgroup = container_cgroup(node, counter)
    cgroups.freeze(cgroup, time.sleep)
    assert is_frozen(cgroup)
    with within(PROMPT):
        node.client.StopContainer(container_id=counter, timeout=0)
    assert node.status(counter).exit_code == 137


def test_the_daemon_is_killed_during_the_dump(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    call = hanging(node, criu, counter, tmp_path / "c.tar")
    cgroup = container_cgroup(node, counter)
    node.kill()
    assert call.wait() is not None
    assert is_frozen(cgroup)
    with within(PROMPT):
        node.start()
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_daemon_is_killed_at_any_moment(node: Node, criu: Criu, counter: str, tmp_path: Path, seed: int) -> None:
    criu.real()
    call = Call(node, counter, tmp_path / "c.tar")
    time.sleep(random.Random(seed).uniform(0.05, 0.35))
    node.kill()
    whole = call.wait() is None
    node.start()
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)
    assert (tmp_path / "c.tar").exists() or not whole
    assert os.listdir(tmp_path) in ([], ["c.tar"])


def test_the_daemon_is_killed_while_the_archive_is_written(
    node: Node, criu: Criu, counter: str, tmp_path: Path
) -> None:
    criu.real()
    node.sh(counter, "head -c 500m /dev/zero > /large")
    cgroup = container_cgroup(node, counter)

    def killed_in_time() -> bool:
        """Whether the daemon, which is dead after this, has not written the whole archive before."""
        call = Call(node, counter, tmp_path / "c.tar")
        eventually(lambda: list(tmp_path.glob(".checkpoint-*")) or call.ended)
        assert not is_frozen(cgroup)
        node.kill()
        return call.wait() is not None and list(tmp_path.glob(".checkpoint-*")) != []

    while not killed_in_time():
        node.start()
        for path in tmp_path.iterdir():
            path.unlink()
    node.start()
    assert os.listdir(tmp_path) == []
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)


def test_an_orderly_stop_of_the_daemon_leaves_the_container_running(
    node: Node, criu: Criu, counter: str, tmp_path: Path
) -> None:
    call = hanging(node, criu, counter, tmp_path / "c.tar")
    assert node.stop() == 0
    assert call.wait() is not None
    before = count(node, counter)
    eventually(lambda: count(node, counter) > before)
    assert_nothing_left(node, tmp_path)


def test_a_checkpoint_past_its_timeout_is_undone(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    call = hanging(node, criu, counter, tmp_path / "c.tar", timeout=1)
    with within(PROMPT):
        assert call.wait().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not done within 1 s" in str(call.outcome.details())
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)


def test_a_container_that_cannot_be_thawed_for_want_of_descriptors_is_thawed_once_there_are_some(
    node: Node, criu: Criu, counter: str, tmp_path: Path
) -> None:
    assert node.process is not None
    pid, go = node.process.pid, tmp_path / "go"
    criu.script(f'{UNTIL} [ -e {go} ]; do sleep 0.01; done; [ "$1" = check ]')
    call = Call(node, counter, tmp_path / "c.tar")
    eventually(lambda: is_frozen(container_cgroup(node, counter)) and criu.started.exists())
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        go.touch()
        assert call.wait().code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    go.unlink()
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)


def test_a_pod_whose_network_a_killed_criu_has_locked_gets_it_back(
    node: Node, criu: Criu, pod: str, counter: str, tmp_path: Path
) -> None:
    inside = f"nsenter --net={node.state}/ns/{pod}/net"
    locked = "*filter\\n:CRIU - [0:0]\\n-I INPUT -j CRIU\\n-I OUTPUT -j CRIU\\n-A CRIU -j DROP\\nCOMMIT\\n"
    criu.script(
        f"[ $1 = check ] && exit\nprintf '{locked}' | {inside} iptables-restore -w --noflush\n"
        f"printf '{locked}' | {inside} ip6tables-restore -w --noflush\n{inside} iptables-save > {tmp_path}/rules\n"
        f"kill -9 $$"
    )
    call = Call(node, counter, tmp_path / "c.tar")
    assert call.wait().code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "-A CRIU -j DROP" in (tmp_path / "rules").read_text()
    for save in ("iptables-save", "ip6tables-save"):
        assert "CRIU" not in subprocess.run([*inside.split(), save], capture_output=True, text=True, check=True).stdout
    assert "0% packet loss" in node.sh(counter, f"ping -c 1 -W 3 {GATEWAY}")
    assert_counts(node, counter)


def test_no_criu(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    known = "CRIU binary not found or too old (<31600). Failed to checkpoint container"
    with refused(grpc.StatusCode.UNKNOWN, known, "needs criu", "install the package criu"):
        node.client.CheckpointContainer(container_id=counter, location=f"{tmp_path}/c.tar")
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)


def test_a_criu_that_is_too_old_for_the_kernel(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    criu.script("echo 'Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds' >&2; exit 1")
    with refused(grpc.StatusCode.UNKNOWN, "older than the kernel", "Unexpected rt vDSO area bounds"):
        node.client.CheckpointContainer(container_id=counter, location=f"{tmp_path}/c.tar")
    assert_counts(node, counter)
    assert_nothing_left(node, tmp_path)


def test_what_criu_cannot_dump_is_told_in_its_words(node: Node, criu: Criu, pod: str, tmp_path: Path) -> None:
    criu.real()
    client = "until nc 127.0.0.1 99 < /dev/zero > /dev/null 2>&1; do sleep 0.1; done"
    script = f"nc -l -p 99 < /dev/zero > /dev/null & ({client}) & {COUNTER}"
    container = node.run(pod, "connected", ["sh", "-c", script])
    assert_counts(node, container)
    eventually(lambda: "ESTABLISHED" in node.sh(container, "netstat -tn"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "Connected TCP socket", "--tcp-established"):
        node.client.CheckpointContainer(container_id=container, location=f"{tmp_path}/c.tar")
    assert_counts(node, container)
    assert_nothing_left(node, tmp_path)


def test_a_container_that_does_not_run(node: Node, criu: Criu, pod: str, tmp_path: Path) -> None:
    container = node.create(pod, "c", ["true"])
    for state in ("created", "exited"):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, f"{state}, not running"):
            node.client.CheckpointContainer(container_id=container, location=f"{tmp_path}/c.tar")
        if state == "created":
            node.client.StartContainer(container_id=container)
            node.wait(container)
    with refused(grpc.StatusCode.NOT_FOUND, "nobody"):
        node.client.CheckpointContainer(container_id="nobody", location=f"{tmp_path}/c.tar")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("", "not an absolute path"),
        ("relative.tar", "not an absolute path"),
        ("{tmp}/a\0b", "zero byte"),
        ("{tmp}/none/c.tar", "directory that exists"),
        ("{tmp}/file/c.tar", "directory that exists"),
        ("{tmp}", "no file"),
        ("{tmp}/", "no file"),
        ("/dev/null", "no file"),
    ],
)
def test_a_bad_location(node: Node, criu: Criu, counter: str, tmp_path: Path, location: str, words: str) -> None:
    criu.script(HANGS)
    (tmp_path / "file").touch()
    location = location.format(tmp=tmp_path)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "location", *([] if "\0" in location else [repr(location)]), words):
        node.client.CheckpointContainer(container_id=counter, location=location)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "timeout = -1"):
        node.client.CheckpointContainer(container_id=counter, location=f"{tmp_path}/c.tar", timeout=-1)
    assert not criu.started.exists()
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk(node: Node, criu: Criu, counter: str, tmp_path: Path) -> None:
    criu.real()
    node.sh(counter, "head -c 20m /dev/zero > /large")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "cri-e2e", tmp_path], check=True)
    try:
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "No space left"):
            node.client.CheckpointContainer(container_id=counter, location=f"{tmp_path}/c.tar")
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert_counts(node, counter)


def is_left(path: str) -> bool:
    """Whether a cgroup cannot be removed yet: a last child of its process may still be ending."""
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return os.path.exists(path)


@pytest.mark.parametrize("controller", ["freezer", ""], ids=["cgroup-v1", "cgroup-v2"])
def test_a_cgroup_is_frozen_while_its_processes_fork(monkeypatch: pytest.MonkeyPatch, controller: str) -> None:
    if controller not in cgroups.roots():
        pytest.skip("this kernel has no such hierarchy mounted")
    root = cgroups.roots()[controller]
    monkeypatch.setattr(cgroups, "roots", lambda: {controller: root})
    script = "import os\nwhile True:\n    if not os.fork(): os._exit(0)\n    os.wait(); print(flush=True)"
    cgroup = f"/cri-e2e-{os.getpid()}"
    os.mkdir(root + cgroup)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            os.set_blocking(process.stdout.fileno(), False)
            Path(f"{root}{cgroup}/cgroup.procs").write_text(str(process.pid))
            for _ in range(20):
                cgroups.freeze(cgroup, time.sleep)
                process.stdout.read()
                time.sleep(0.02)
                assert not process.stdout.read(), "it forks on"
                cgroups.thaw(cgroup)
                cgroups.thaw(cgroup)
                eventually(process.stdout.read)
        finally:
            cgroups.thaw(cgroup)
            process.kill()
            process.wait()
            eventually(lambda: not is_left(root + cgroup))
    cgroups.thaw(cgroup)
    with pytest.raises(FailedPreconditionError, match="No such file"):
        cgroups.freeze(cgroup, time.sleep)
