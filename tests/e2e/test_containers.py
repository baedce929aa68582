"""Containers: created, started, watched, stopped and removed; their logs and execs."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node
from tests.support.waiting import eventually


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def trapping(node: Node, pod: str, name: str, traps: str, **fields: Any) -> str:
    """A container that has its traps set and goes on until a signal ends it."""
    container = node.run(pod, name, ["sh", "-c", f"{traps}; echo ready; while :; do sleep 0.05; done"], **fields)
    eventually(lambda: node.log(container) == "ready\n")
    return container


def linux(**security: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**security))


def test_the_life_of_a_container(node: Node, pod: str) -> None:
    before = time.time_ns()
    container = node.create(pod, "life", ["sh", "-c", "echo out; echo err >&2; exit 3"], labels={"a": "b"})
    created = node.status(container)
    assert created.state == cri.CONTAINER_CREATED
    assert before < created.created_at < time.time_ns()
    assert (created.started_at, created.finished_at, created.exit_code) == (0, 0, 0)
    node.client.StartContainer(container_id=container)
    ended = node.wait(container)
    assert (ended.exit_code, ended.reason) == (3, "Error")
    assert created.created_at < ended.started_at <= ended.finished_at < time.time_ns()
    assert ended.image.image == "localhost/busybox:latest"
    assert ended.image_id.startswith("sha256:")
    assert dict(ended.labels) == {"a": "b"}
    with open(ended.log_path) as f:
        lines = sorted(line.split(" ", 1)[1] for line in f)
    assert lines == ["stderr F err\n", "stdout F out\n"]
    node.client.RemoveContainer(container_id=container)
    node.client.RemoveContainer(container_id=container)
    assert os.path.exists(ended.log_path), "a log is the kubelet's to remove"


def test_success_is_completed(node: Node, pod: str) -> None:
    ended = node.wait(node.run(pod, "ok", ["true"]))
    assert (ended.exit_code, ended.reason) == (0, "Completed")


def test_an_exited_containers_root_is_not_mounted_any_more(node: Node, pod: str) -> None:
    container = node.run(pod, "unmounted", ["true"])
    node.wait(container)
    eventually(lambda: not os.path.ismount(f"{node.state}/containers/{container}/rootfs"))


@pytest.mark.parametrize(
    ("fields", "printed"),
    [
        ({"command": ["echo"], "args": ["a", "b"]}, "a b\n"),
        ({"command": ["sh", "-c", "echo $0 $ONE $TWO"], "envs": [("ONE", "1"), ("TWO", "2")]}, "sh 1 2\n"),
        ({"command": ["pwd"], "working_dir": "/var/new/dir"}, "/var/new/dir\n"),
        ({"command": ["sh", "-c", "echo $PATH"]}, None),
        ({"command": ["id", "-u"], "linux": linux(run_as_user=cri.Int64Value(value=1234))}, "1234\n"),
        ({"command": ["id", "-un"], "linux": linux(run_as_username="nobody")}, "nobody\n"),
        (
            {
                "command": ["id", "-G"],
                "linux": linux(
                    run_as_user=cri.Int64Value(value=7),
                    run_as_group=cri.Int64Value(value=8),
                    supplemental_groups=[9, 10],
                ),
            },
            "8 9 10\n",
        ),
        ({"command": ["sh", "-c", "touch /x || echo refused"], "linux": linux(readonly_rootfs=True)}, None),
    ],
)
def test_what_the_process_is_started_with(node: Node, pod: str, fields: dict[str, Any], printed: str | None) -> None:
    if "envs" in fields:
        fields = {**fields, "envs": [cri.KeyValue(key=k, value=v.encode()) for k, v in fields["envs"]]}
    container = node.run(pod, "started", **fields)
    assert node.wait(container).exit_code == 0
    log = node.log(container)
    if printed is not None:
        assert log == printed
    elif "linux" in fields:
        assert "refused" in log
    else:
        assert "/bin" in log


def test_the_images_own_command_environment_directory_and_user(node: Node, pod: str, tmp_path: Path) -> None:
    from tests.support.fixtures import import_image
    from tests.support.imagebuilder import busybox_image, write_archive

    config = {
        "Entrypoint": ["sh", "-c", 'echo "$0 $1 $FROM_IMAGE $(pwd) $(id -u):$(id -g)"'],
        "Cmd": ["zero", "one"],
        "Env": ["PATH=/bin", "FROM_IMAGE=yes"],
        "WorkingDir": "/tmp",
        "User": "nobody",
    }
    write_archive(busybox_image(config=config), str(tmp_path / "i.tar"), "localhost/configured:1")
    import_image(node, str(tmp_path / "i.tar"))
    default = node.run(pod, "default", image="localhost/configured:1")
    assert node.wait(default).exit_code == 0
    assert node.log(default) == "zero one yes /tmp 65534:65534\n"
    status = node.status(default)
    assert status.user.linux.uid == 65534
    argued = node.run(pod, "argued", image="localhost/configured:1", args=["a", "b"])
    node.wait(argued)
    assert node.log(argued) == "a b yes /tmp 65534:65534\n"
    commanded = node.run(pod, "commanded", ["echo", "mine"], image="localhost/configured:1")
    node.wait(commanded)
    assert node.log(commanded) == "mine\n"


def test_an_image_without_layers_and_with_dockers_empty_entrypoint(node: Node, pod: str, tmp_path: Path) -> None:
    from tests.support.fixtures import import_image
    from tests.support.imagebuilder import build_image, write_archive

    config = {"Entrypoint": [""], "Cmd": ["/bin/busybox", "ls", "-a", "/"], "Env": ["", None], "User": None}
    write_archive(build_image([], config), str(tmp_path / "i.tar"), "localhost/empty:1")
    import_image(node, str(tmp_path / "i.tar"))
    busybox = cri.Mount(container_path="/bin/busybox", host_path="/bin/busybox", readonly=True)
    container = node.run(pod, "c", image="localhost/empty:1", mounts=[busybox])
    assert node.wait(container).exit_code == 0
    assert {"bin", "dev", "proc"} <= set(node.log(container).split())
    assert "usr" not in node.log(container).split()


def test_mounts(node: Node, pod: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")
    (tmp_path / "link").symlink_to(tmp_path / "given")
    mounts = [
        cri.Mount(container_path="/data", host_path=str(tmp_path)),
        cri.Mount(container_path="/data/nested", host_path=str(tmp_path / "made")),
        cri.Mount(container_path="/fixed", host_path=str(tmp_path), readonly=True),
        cri.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "link")),
    ]
    container = node.run(pod, "mounts", ["sleep", "1000"], mounts=mounts)
    assert node.sh(container, "cat /data/given /etc/hosts") == "from the host\n" * 2
    node.sh(container, "echo back > /data/written; echo deep > /data/nested/file")
    assert (tmp_path / "written").read_text() == "back\n"
    assert (tmp_path / "made" / "file").read_text() == "deep\n"
    assert node.sh(container, "touch /fixed/x 2>&1 || true").endswith("Read-only file system\n")
    assert len(node.status(container).mounts) == 4


def test_stop_sends_the_signal_waits_the_grace_and_kills(node: Node, pod: str) -> None:
    polite = trapping(node, pod, "polite", "trap 'exit 7' TERM")
    node.client.StopContainer(container_id=polite, timeout=20)
    assert node.status(polite).exit_code == 7
    deaf = trapping(node, pod, "deaf", "trap '' TERM")
    began = time.monotonic()
    node.client.StopContainer(container_id=deaf, timeout=1)
    assert time.monotonic() - began >= 1
    assert node.status(deaf).exit_code == 137
    node.client.StopContainer(container_id=deaf, timeout=1)


def test_a_kill_does_not_wait_for_an_earlier_stops_grace(node: Node, pod: str) -> None:
    deaf = trapping(node, pod, "deaf", "trap 'echo told' TERM")
    first = node.client.StopContainer.begin(container_id=deaf, timeout=1000)
    eventually(lambda: node.log(deaf) == "ready\ntold\n")
    first.cancel()
    node.client.StopContainer(container_id=deaf, timeout=0)
    assert node.status(deaf).exit_code == 137


@pytest.mark.parametrize("restarted", [False, True], ids=["kubelet", "daemon"])
def test_the_stop_signal_is_sent_once(node: Node, pod: str, restarted: bool) -> None:
    """A kubelet stops its pods anew after it or the daemon was started anew. Many programs end with a second signal."""
    graceful = trapping(node, pod, "graceful", "trap 'trap \"exit 9\" TERM; echo told' TERM")
    first = node.client.StopContainer.begin(container_id=graceful, timeout=1000)
    eventually(lambda: node.log(graceful) == "ready\ntold\n")
    if restarted:
        record = Path(node.state, "records", "containers", graceful)
        eventually(lambda: '"stop_signalled":true' in record.read_text())
        node.kill()
        node.start()
    else:
        first.cancel()
    node.client.StopContainer(container_id=graceful, timeout=1)
    assert node.status(graceful).exit_code == 137, "the second call waits for its own grace"


@pytest.mark.parametrize("asked", ["image", "kubelet"])
def test_the_stop_signal_is_the_kubelets_or_the_images(node: Node, pod: str, tmp_path: Path, asked: str) -> None:
    from tests.support.fixtures import import_image
    from tests.support.imagebuilder import busybox_image, write_archive

    write_archive(busybox_image(config={"StopSignal": "SIGUSR1"}), str(tmp_path / "i.tar"), "localhost/usr1:1")
    import_image(node, str(tmp_path / "i.tar"))
    fields = {"stop_signal": cri.SIGUSR2} if asked == "kubelet" else {}
    traps = "trap 'exit 11' USR1; trap 'exit 12' USR2"
    container = trapping(node, pod, "signalled", traps, image="localhost/usr1:1", **fields)
    node.client.StopContainer(container_id=container, timeout=20)
    assert node.status(container).exit_code == (12 if asked == "kubelet" else 11)


def test_listing_by_every_filter(node: Node, pod: str) -> None:
    other = node.run_pod("other")
    one = node.run(pod, "one", ["sleep", "1000"], labels={"app": "x"})
    two = node.create(pod, "two", ["true"], labels={"app": "y"})
    three = node.run(other, "three", ["true"], labels={"app": "x"})
    node.wait(three)

    def ids(**wanted: Any) -> set[str]:
        return {c.id for c in node.client.ListContainers(filter=cri.ContainerFilter(**wanted)).containers}

    assert ids() == {one, two, three}
    assert ids(id=one) == ids(id=one[:13]) == {one}
    assert ids(pod_sandbox_id=pod) == {one, two}
    for state, found in ((cri.CONTAINER_RUNNING, one), (cri.CONTAINER_CREATED, two), (cri.CONTAINER_EXITED, three)):
        assert ids(state=cri.ContainerStateValue(state=state)) == {found}
    assert ids(label_selector={"app": "x"}) == {one, three}
    assert ids(pod_sandbox_id=pod, label_selector={"app": "x"}) == {one}
    assert ids(id="f" * 64) == set()


def test_verbose_status_has_the_spec(node: Node, pod: str) -> None:
    container = node.run(pod, "verbose", ["sleep", "1000"])
    info = json.loads(node.client.ContainerStatus(container_id=container, verbose=True).info["info"])
    assert info["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]
    assert os.path.exists(f"/proc/{info['pid']}")


def test_exec(node: Node, pod: str) -> None:
    container = node.run(pod, "exec", ["sleep", "1000"], envs=[cri.KeyValue(key="HELLO", value=b"there")])
    result = node.client.ExecSync(
        container_id=container, cmd=["sh", "-c", "echo $HELLO; echo oops >&2; exit 5"], timeout=30
    )
    assert (result.stdout, result.stderr, result.exit_code) == (b"there\n", b"oops\n", 5)
    killed = node.client.ExecSync(container_id=container, cmd=["sh", "-c", "kill -9 $$"], timeout=30)
    assert killed.exit_code == 137


def test_an_execs_large_output_is_whole(node: Node, pod: str) -> None:
    container = node.run(pod, "large", ["sleep", "1000"])
    result = node.client.ExecSync(
        container_id=container, cmd=["sh", "-c", "yes 0123456789abcde | head -c 7000000"], timeout=30
    )
    assert len(result.stdout) == 7000000
    assert result.stdout == (b"0123456789abcde\n" * 437500)


def test_an_exec_past_its_timeout_dies_with_its_process_group(node: Node, pod: str) -> None:
    container = node.run(pod, "timeout", ["sleep", "1000"])
    with pytest.raises(grpc.RpcError) as e:
        node.client.ExecSync(container_id=container, cmd=["sh", "-c", "sleep 4711 & sleep 4712"], timeout=1)
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "timed out after 1 s" in str(e.value.details())
    eventually(lambda: "471" not in node.sh(container, "ps -o args | grep '[s]leep 47' || true"))


def test_an_exec_whose_caller_goes_away_dies(node: Node, pod: str) -> None:
    container = node.run(pod, "gone", ["sleep", "1000"])
    with pytest.raises(grpc.RpcError):
        node.client.ExecSync(deadline=0.5, container_id=container, cmd=["sleep", "4713"], timeout=0)
    eventually(lambda: "4713" not in node.sh(container, "ps -o args | grep '[s]leep 4713' || true"))


def test_a_rotated_log_goes_on_in_a_new_file(node: Node, pod: str) -> None:
    container = node.run(pod, "rotated", ["sh", "-c", "while :; do echo tick; sleep 0.05; done"])
    path = node.status(container).log_path
    eventually(lambda: os.path.getsize(path) > 0)
    os.rename(path, path + ".1")
    node.client.ReopenContainerLog(container_id=container)
    size = os.path.getsize(path + ".1")
    eventually(lambda: os.path.getsize(path) > 0)
    assert os.path.getsize(path + ".1") == size
    pattern = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z stdout F tick\n$")
    for name in (path, path + ".1"):
        with open(name) as f:
            assert all(pattern.match(line) for line in f)


def test_a_log_directory_that_was_deleted_is_made_again(node: Node) -> None:
    pod = node.run_pod("deleted")
    directory = f"{node.logs}/deleted"
    script = ["sh", "-c", "while :; do echo tick; sleep 0.05; done"]
    created = node.create(pod, "later", script)
    running = node.run(pod, "running", script)
    shutil.rmtree(directory)
    node.client.StartContainer(container_id=created)
    eventually(lambda: os.path.getsize(f"{directory}/later.log") > 0)
    assert not os.path.exists(f"{directory}/running.log")
    shutil.rmtree(directory)
    for container in (created, running):
        node.client.ReopenContainerLog(container_id=container)
    for name in ("later", "running"):
        eventually(lambda path=f"{directory}/{name}.log": os.path.getsize(path) > 0)  # type: ignore[misc]
    # What is in the place of the directory is neither followed nor replaced.
    shutil.rmtree(directory)
    with open(directory, "w"):
        pass
    with pytest.raises(grpc.RpcError, match="there can be no log at"):
        node.client.ReopenContainerLog(container_id=running)
    assert os.path.getsize(directory) == 0
    node.client.RemovePodSandbox(pod_sandbox_id=pod)


def test_a_long_log_is_whole(node: Node, pod: str) -> None:
    container = node.run(pod, "long", ["sh", "-c", "seq 1 300000"])
    assert node.wait(container).exit_code == 0
    assert node.log(container) == "".join(f"{n}\n" for n in range(1, 300001))


def test_a_terminal(node: Node, pod: str) -> None:
    container = node.run(pod, "tty", ["sh", "-c", "tty; echo out; echo err >&2"], tty=True)
    assert node.wait(container).exit_code == 0
    assert node.log(container).replace("\r", "") == "/dev/pts/0\nout\nerr\n"


def test_an_oom_kill_is_told(node: Node, pod: str) -> None:
    config = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=16 << 20))
    container = node.run(pod, "oom", ["sh", "-c", "head -c 200m /dev/zero | tail"], linux=config)
    ended = node.wait(container)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


def test_a_first_process_that_is_killed_for_want_of_memory_is_told_and_its_neighbour_is_not(
    node: Node, pod: str
) -> None:
    """Under systemd the cgroup with the count may be gone as soon as its only process is."""
    config = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=16 << 20))
    neighbour = node.run(pod, "neighbour", ["sleep", "1000"])
    for attempt in range(5):
        command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=40M"]
        ended = node.wait(node.run(pod, "oom", command, attempt=attempt, linux=config))
        assert (ended.exit_code, ended.reason) == (137, "OOMKilled"), attempt
    node.client.StopContainer(container_id=neighbour, timeout=0)
    ended = node.status(neighbour)
    assert (ended.exit_code, ended.reason) == (137, "Error")


def test_fifty_short_containers_keep_their_exit_codes(node: Node, pod: str) -> None:
    containers = [node.run(pod, f"short-{n}", ["sh", "-c", f"exit {n}"]) for n in range(50)]
    assert [node.wait(c).exit_code for c in containers] == list(range(50))
