"""What an operator does with crictl, from a pull to a clean node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.imagebuilder import busybox_image
from tests.support.node import SUBNET, Node
from tests.support.registry import Registry
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.skipif(shutil.which("crictl") is None, reason="crictl is not on PATH"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real mounts, namespaces and containers"),
]

NAME = "registry.test/busybox:1.36"
IMAGE = busybox_image(config={"Labels": {"for": "crictl"}})


class Crictl:
    def __init__(self, node: Node) -> None:
        self.node = node

    def __call__(self, *arguments: str) -> str:
        endpoint = f"unix://{self.node.socket}"
        command = ["crictl", "--config", "/dev/null", "--runtime-endpoint", endpoint, "--image-endpoint", endpoint]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"crictl {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()


@pytest.fixture
def crictl(node: Node, registry: Registry) -> Crictl:
    """crictl on a node whose hosts.toml leads registry.test to the registry of the tests."""
    registry.push(IMAGE, "busybox:1.36")
    os.makedirs(f"{node.certs}/registry.test", exist_ok=True)
    with open(f"{node.certs}/registry.test/hosts.toml", "w") as f:
        f.write(f'[host."http://{registry.address}"]\ncapabilities = ["pull", "resolve"]\n')
    return Crictl(node)


def test_an_operators_round(crictl: Crictl, tmp_path: Path) -> None:
    (tmp_path / "pod.json").write_text(
        json.dumps({"metadata": {"name": "op", "namespace": "default", "uid": "1"}, "log_directory": str(tmp_path)})
    )
    (tmp_path / "container.json").write_text(
        json.dumps(
            {
                "metadata": {"name": "main"},
                "image": {"image": NAME},
                "command": ["sh", "-c", "echo hello from crictl; exec sleep 1000"],
                "log_path": "main.log",
            }
        )
    )
    assert IMAGE.id in crictl("pull", NAME)
    images = json.loads(crictl("images", "-o", "json"))["images"]
    assert [i["repoTags"] for i in images if NAME in i["repoTags"]] == [[NAME]]
    assert json.loads(crictl("inspecti", NAME))["status"]["repoTags"] == [NAME]

    pod = crictl("runp", str(tmp_path / "pod.json"))
    container = crictl("create", pod, str(tmp_path / "container.json"), str(tmp_path / "pod.json"))
    assert crictl("start", container) == container
    assert crictl("ps", "-q") == container
    assert crictl("pods", "-q") == pod
    assert json.loads(crictl("inspectp", pod))["status"]["network"]["ip"].startswith(SUBNET.removesuffix("0.0/16"))
    assert json.loads(crictl("inspect", container))["status"]["state"] == "CONTAINER_RUNNING"
    assert crictl("inspect", "-o", "go-template", "--template", "{{.status.image.image}}", container[:12]) == NAME
    eventually(lambda: crictl("logs", container) == "hello from crictl")
    assert crictl("exec", "-s", container, "echo", "from", "exec") == "from exec"

    assert crictl("stop", "--timeout", "0", container) == container
    assert json.loads(crictl("inspect", container))["status"]["exitCode"] == 137
    assert crictl("ps", "-q") == ""
    assert crictl("ps", "-aq") == container
    assert crictl("rm", container) == container
    assert "op" in crictl("stopp", pod) or pod in crictl("stopp", pod)
    crictl("rmp", pod)
    assert crictl("pods", "-q") == ""
    crictl("rmi", NAME)
    assert NAME not in crictl("images")
    assert json.loads(crictl("info"))["status"]["conditions"]
    assert json.loads(crictl("imagefsinfo"))["status"]["imageFilesystems"]
    assert "criserver" in crictl("version")
