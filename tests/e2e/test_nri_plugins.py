"""The plugins of the NRI project, which speak by its own library in Go, where they are on PATH as nri-NAME."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.waiting import eventually


@contextmanager
def running(node: Node, name: str, *options: str) -> Iterator[None]:
    """A connected plugin. Skips where it is not on PATH."""
    program = shutil.which(f"nri-{name}")
    if program is None:
        pytest.skip(f"nri-{name} is not on PATH")
    # Its library takes a connected socket from the environment, as from a runtime that starts it.
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{node.base}/nri/nri.sock")
        names = {"NRI_PLUGIN_NAME": name, "NRI_PLUGIN_IDX": "10", "NRI_PLUGIN_SOCKET": str(client.fileno())}
        environment = {**os.environ, **names}
        plugin = subprocess.Popen(
            [program, *options],
            env=environment,
            pass_fds=[client.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        eventually(lambda: f'"plugin": "10-{name}", "order"' in node.daemon_log())
        yield
    finally:
        plugin.kill()
        plugin.wait()


def test_the_logger_sees_every_event(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(node, "logger", "-log-file", str(log)):
        pod = node.run_pod("logged")
        node.run(pod, "c", ["sleep", "1000"])
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
        eventually(lambda: "RemovePodSandbox" in log.read_text())
    words = log.read_text()
    for event in ("RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "RemoveContainer"):
        assert event in words


def test_the_device_injector_adds_a_device_and_a_mount(node: Node) -> None:
    device = "- path: /dev/plugged\n  type: c\n  major: 1\n  minor: 3\n"
    mount = f"- source: {node.logs}\n  destination: /injected\n  type: bind\n  options: [rbind, ro]\n"
    annotations = {
        "devices.noderesource.dev/container.c": device,
        "mounts.noderesource.dev/container.c": mount,
    }
    with running(node, "device-injector"):
        pod = node.run_pod("devices", annotations=annotations)
        container = node.run(pod, "c", ["sleep", "1000"])
        assert node.sh(container, "echo x > /dev/plugged; ls -d /dev/plugged /injected").split() == [
            "/dev/plugged",
            "/injected",
        ]


def test_the_ulimit_adjuster_sets_a_limit(node: Node) -> None:
    annotations = {"ulimits.noderesource.dev/container.c": "- type: nofile\n  hard: 700\n  soft: 600\n"}
    with running(node, "ulimit-adjuster"):
        pod = node.run_pod("limits", annotations=annotations)
        container = node.run(pod, "c", ["sleep", "1000"])
        with open(f"{node.state}/containers/{container}/config.json") as f:
            (limit,) = json.load(f)["process"]["rlimits"]
        assert limit == {"type": "RLIMIT_NOFILE", "hard": 700, "soft": 600}
        with open(f"/proc/{node.pid(container)}/limits") as f:
            (line,) = [line.split() for line in f if line.startswith("Max open files")]
        assert line[3:5] == ["600", "700"]


def test_the_hook_injector_adds_a_hook(node: Node, tmp_path: Path) -> None:
    """It reads the hooks of a directory that cannot be chosen, so this is only done where that is empty."""
    hooks = Path("/etc/containers/oci/hooks.d")
    if hooks.exists():
        pytest.skip(f"{hooks} is there already")
    made = next(parent for parent in (*reversed(hooks.parents), hooks) if not parent.exists())
    hooks.mkdir(parents=True)
    try:
        out = tmp_path / "hooked"
        program = tmp_path / "hook"
        program.write_text(f"#!/bin/sh\ncat > {out}\n")
        program.chmod(0o755)
        (hooks / "mine.json").write_text(
            json.dumps(
                {
                    "version": "1.0.0",
                    "hook": {"path": str(program)},
                    "when": {"always": True},
                    "stages": ["prestart"],
                }
            )
        )
        with running(node, "hook-injector"):
            pod = node.run_pod("hooks")
            container = node.run(pod, "c", ["sleep", "1000"])
            assert json.loads(out.read_text())["id"] == container
    finally:
        shutil.rmtree(made)


def test_the_template_changes_nothing(node: Node) -> None:
    with running(node, "template"):
        pod = node.run_pod("template")
        container = node.run(pod, "c", ["sleep", "1000"])
        assert node.sh(container, "echo works") == "works\n"
