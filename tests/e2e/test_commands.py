"""The operator's commands that look at a node: real subprocesses at a real daemon."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node
from tests.support.terminal import Terminal
from tests.support.waiting import SLOWNESS, eventually


def words(node: Node, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "criserver", "--config", node.config, *arguments]


def command(node: Node, *arguments: str, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command at the node's daemon; it ends with ``code`` and never with a traceback."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120 * SLOWNESS, **more}
    done = subprocess.run(words(node, *arguments), check=False, **options)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in (done.stderr or "")
    return done


def document(node: Node, *arguments: str) -> Any:
    return json.loads(command(node, *arguments).stdout)


def test_pods_and_containers_are_listed_for_people_and_for_programs(node: Node) -> None:
    pod = node.run_pod("web")
    runs = node.run(pod, "main", ["sleep", "1000"])
    ended = node.run(pod, "init", ["sh", "-c", "exit 3"])
    node.wait(ended)
    table = command(node, "pods").stdout.splitlines()
    assert table[0].split() == ["POD", "ID", "STATE", "RUNNING", "AGE", "ATTEMPT", "HANDLER"]
    assert table[1].split()[:4] == ["e2e/web", pod[:12], "ready", "1"]
    assert command(node, "pods", "--namespace", "other", "-q").stdout == ""
    assert [p["metadata"]["name"] for p in document(node, "pods", "--json")] == ["web"]
    (line,) = command(node, "ps").stdout.splitlines()[1:]
    assert line.split()[:4] == ["main", "e2e/web", runs[:12], "running"]
    assert set(command(node, "ps", "--all", "--quiet", "--pod", "e2e/web").stdout.split()) == {runs, ended}
    assert "exited 3" in command(node, "ps", "-a").stdout
    # What it prints is plain text where there is no terminal.
    assert "\x1b" not in command(node, "ps", "-a").stdout


def test_inspect_finds_by_prefix_and_by_name_and_tells_what_cri_does_not(node: Node) -> None:
    pod = node.run_pod("web")
    container = node.run(pod, "main", ["sleep", "1000"], envs=[cri.KeyValue(key="TOKEN", value=b"s3cret")])
    found = document(node, "inspect", "e2e/web")
    assert (found["kind"], found["id"], found["state"]) == ("pod", pod, "ready")
    assert found["network"] and os.path.exists(found["namespaces"]["net"])
    assert found["containers"] == [{"id": container, "name": "main", "state": "running"}]
    found = document(node, "inspect", container[:10])
    assert (found["kind"], found["name"], found["pid"]) == ("container", "e2e/web/main", node.pid(container))
    assert f"{found['bundle']}/rootfs" in found["mounts"]
    assert found["shim"]["exists"]
    assert found["shim"]["running"]
    assert found["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]
    assert found["logPath"] == node.status(container).log_path
    assert "does not exist" in command(node, "inspect", "e2e/none", code=1).stderr


def test_status_tells_states_work_under_way_and_warnings(node: Node) -> None:
    pod = node.run_pod("web")
    container = node.run(pod, "main", ["sh", "-c", "trap '' TERM; sleep 1000"])
    found = document(node, "status", "--json")
    assert found["conditions"] == [
        {"type": "RuntimeReady", "status": True, "reason": "", "message": ""},
        {"type": "NetworkReady", "status": True, "reason": "", "message": ""},
    ]
    assert (found["pods"]["ready"], found["containers"]["running"], found["recovering"]) == (1, 1, [])
    assert found["socket"] == node.socket
    assert found["disk"]["blobs"] > 0 < found["disk"]["layers"]
    call = subprocess.Popen(
        [sys.executable, "-c", STOP, node.socket, container], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: [c["rpc"] for c in document(node, "status", "--json")["calls"]] == ["StopContainer"], 30)
        text = command(node, "status").stdout
        assert "StopContainer" in text
        assert "e2e/web" in text
    finally:
        node.client.StopContainer(container_id=container, timeout=0)
        call.wait(60 * SLOWNESS)
    eventually(lambda: "No work is under way" in command(node, "status").stdout, 30)
    with pytest.raises(Exception, match="capability"):
        node.create(pod, "bad", ["true"], linux=NO_SUCH_CAPABILITY)
    last = document(node, "status", "--json")["warnings"][-1]
    assert (last["level"], last["event"]) == ("warning", "call failed")
    assert "pod=e2e/web" in last["fields"]


STOP = """
import sys
from tests.support.node import Client
Client(sys.argv[1]).StopContainer(container_id=sys.argv[2], timeout=1000)
"""
NO_SUCH_CAPABILITY = cri.LinuxContainerConfig(
    security_context=cri.LinuxContainerSecurityContext(capabilities=cri.Capability(add_capabilities=["A B"]))
)


def test_a_network_that_is_not_ready_makes_status_fail(node: Node) -> None:
    os.rename(f"{node.cni}/10-e2e.conflist", f"{node.cni}/10-e2e.off")
    try:
        assert "NetworkReady" in command(node, "status", code=1).stdout
    finally:
        os.rename(f"{node.cni}/10-e2e.off", f"{node.cni}/10-e2e.conflist")


def test_events_are_followed_and_ctrl_c_is_130(node: Node) -> None:
    follower = subprocess.Popen(words(node, "events"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    told, number = follower.stdout, 0

    def seen() -> bool:
        """Whether the follower listens by now: events before that are lost, so more pods are made until one is told."""
        nonlocal number
        number += 1
        node.run_pod(f"p{number}")
        return bool(select.select([told], [], [], 0.5)[0])

    eventually(seen, 60)
    first = told.readline().split()
    assert first[2] in ("created", "started")
    assert first[3].startswith("e2e/p")
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=120 * SLOWNESS)
    assert follower.returncode == 130
    assert "Traceback" not in errors


def test_logs_are_printed_and_followed_until_the_end(node: Node) -> None:
    pod = node.run_pod("web")
    os.makedirs(f"{node.logs}/web", exist_ok=True)
    container = node.run(pod, "main", ["sh", "-c", "echo one; echo bad >&2; echo two; read x; echo three"], stdin=True)
    eventually(lambda: "two" in node.log(container))
    done = command(node, "logs", container[:12])
    assert (done.stdout, done.stderr) == ("one\ntwo\n", "bad\n")
    done = command(node, "logs", "e2e/web/main", "-n", "1")
    assert len((done.stdout + done.stderr).splitlines()) == 1
    follower = subprocess.Popen(words(node, "logs", "-f", container), stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert [follower.stdout.readline() for _ in range(2)] == ["one\n", "two\n"]
    # As the kubelet rotates: the rest of the old file is printed too, and then the new one.
    path = node.status(container).log_path
    os.rename(path, f"{path}.1")
    node.client.ReopenContainerLog(container_id=container)
    with open(path, "a") as log:  # before the container's end, which is the follower's end too
        log.write("2026-01-01T00:00:00Z stdout F new\n")
    node.client.StopContainer(container_id=container, timeout=0)
    rest, _ = follower.communicate(timeout=120 * SLOWNESS)
    assert (rest, follower.returncode) == ("new\n", 0)


def test_du_tells_what_eats_the_disk_and_who_uses_an_image(node: Node) -> None:
    pod = node.run_pod("web")
    container = node.run(pod, "main", ["sh", "-c", "echo hello; sleep 1000"])

    def use() -> Any:
        return document(node, "du", "--json")

    def is_measured() -> bool:
        (found,) = use()["containers"]
        return bool(found["measuredAt"] and found["inodes"] and found["log"] > len("hello"))

    eventually(is_measured, 60)
    (image,) = (i for i in use()["images"] if "localhost/busybox:latest" in i["image"]["names"])
    assert image["users"] == ["e2e/web/main"]
    assert image["own"] == image["blobs"] + image["layers"] > 0
    assert container[:12] in command(node, "du").stdout


def test_top_measures_pods_and_containers(node: Node) -> None:
    busy = node.run(node.run_pod("busy"), "spin", ["sh", "-c", "while :; do :; done"])
    idle = node.run(node.run_pod("idle"), "main", ["sleep", "1000"])
    pods = document(node, "top", "--json", "--interval", "0.5")
    assert [pod["pod"] for pod in pods] == ["e2e/busy", "e2e/idle"]
    assert pods[0]["cpuMillicores"] > 0
    assert pods[0]["processes"] == 1
    containers = document(node, "top", "--json", "--containers", "--interval", "0.5", "--sort", "name")
    assert [(c["id"], c["container"]) for c in containers] == [(busy, "spin"), (idle, "main")]
    assert all(c["memoryBytes"] > 0 for c in containers)
    # No terminal is as --once.
    heading, columns, first, _ = command(node, "top", "--interval", "0.5").stdout.splitlines()
    assert heading.split()[1:3] == ["2", "pods,"]
    assert columns.split()[:4] == ["POD", "ID", "CPU", "MEMORY"]
    assert first.startswith("e2e/busy")


def test_top_draws_again_and_gives_the_terminal_back_at_ctrl_c(node: Node) -> None:
    node.run_pod("web")
    with Terminal(words(node, "top", "--interval", "0.1"), columns=100, rows=10) as terminal:
        terminal.until(b"\x1b[?1049h")
        terminal.until(b"e2e/web")
        node.run_pod("later")
        terminal.until(b"e2e/later")
        terminal.type("\x03")
        terminal.until(b"\x1b[?25h\x1b[?1049l")
        assert terminal.process.wait(60 * SLOWNESS) == 130


def test_a_bundle_has_all_that_a_report_needs_and_no_secret(node: Node, tmp_path: Path) -> None:
    pod = node.run_pod("web", annotations={"db-password": "s3cret"})
    secret = cri.KeyValue(key="NAME", value=b"s3cret")
    container = node.run(pod, "main", ["sleep", "1000"], envs=[secret])
    file = tmp_path / "bundle.tar.gz"
    assert str(file) in command(node, "debug", "bundle", str(file)).stdout
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as archive:
        found = {
            member.name.partition("/")[2]: (archive.extractfile(member) or pytest.fail(member.name)).read().decode()
            for member in archive.getmembers()
        }
    assert {
        "status.json",
        "disk.json",
        "trace.json",
        f"pods/{pod}.json",
        f"containers/{container}.json",
        "config/effective.toml",
        "config/config.toml",
        "cni/10-e2e.conflist",
        "versions.txt",
    } <= set(found)
    assert "s3cret" not in "".join(found.values())
    assert base64.b64encode(b"s3cret").decode() not in "".join(found.values())
    assert "NAME=<removed>" in json.loads(found[f"containers/{container}.json"])["runtimeSpec"]["process"]["env"]
    assert {"thread", "task"} == {stack["kind"] for stack in json.loads(found["status.json"])["stacks"]}
    assert "exists already" in command(node, "debug", "bundle", str(file), code=1).stderr


def test_a_bundle_is_made_without_a_daemon(tmp_path: Path) -> None:
    config, file = tmp_path / "config.toml", tmp_path / "bundle.tar.gz"
    config.write_text(f'[grpc]\naddress = "{tmp_path}/none.sock"\n')
    arguments = ["debug", "bundle", str(file), "--config", str(config)]
    done = subprocess.run([sys.executable, "-m", "criserver", *arguments], capture_output=True, text=True, check=True)
    assert "left out: daemon: no daemon answers" in done.stderr
    with tarfile.open(file) as archive:
        assert any(name.endswith("/config/config.toml") for name in archive.getnames())


def test_a_command_without_a_daemon_or_without_the_right_says_which(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[grpc]\naddress = "{tmp_path}/none.sock"\n')
    done = subprocess.run(
        [sys.executable, "-m", "criserver", "ps", "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "no daemon answers" in done.stderr
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        config = Path(directory, "config.toml")
        config.write_text(f'[grpc]\naddress = "{node.socket}"\n')
        os.chmod(node.base, 0o711)
        as_nobody = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "criserver"]
        done = subprocess.run([*as_nobody, "ps", "--config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "may not be opened by this user" in done.stderr


@pytest.mark.parametrize("arguments", [("pods",), ("config", "default"), ("--help",)])
def test_a_full_device_is_one_line(node: Node, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = command(node, *arguments, code=1, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == "criserver: No space left on device\n"


def test_a_closed_pipe_is_one_line(node: Node) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = command(node, "pods", code=1, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert done.stderr == "criserver: Broken pipe\n"
