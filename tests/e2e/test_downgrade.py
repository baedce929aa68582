"""A node of this release on which the last release's daemon is started: it harms nothing, and there is a way back.

The release's sources are those of its commit, which a clone without a history does not have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image, serving
from tests.support.node import Node
from tests.support.waiting import SLOWNESS
from tests.vm.releases import LAST, NO_HISTORY, RELEASES, has

PROJECT = str(Path(__file__).parents[2])
# Tables and keys of the configuration that the last release does not know.
NEW = re.compile(r"^(?:\[(?:nri|cdi)\]\n(?:[^\[].*\n)*|netns_dir = .*\n)", re.MULTILINE)
# Its modules come before those of the work tree.
RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from criserver.cli import main; sys.exit(main(sys.argv[1:]))"


class Release:
    """The sources of the last release in a directory, and the node's configuration as it knows it."""

    def __init__(self, directory: str, node: Node) -> None:
        wanted = ("criserver", "shims", "snapshotter", "proto", "setup.py")
        command = ["git", "-C", PROJECT, "archive", RELEASES[LAST], *wanted]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
        subprocess.run([sys.executable, "-c", "import setup; setup.generate()"], cwd=directory, check=True)
        self.program = ["-P", "-c", RUN, directory]
        self.config = f"{directory}/config.toml"
        Path(self.config).write_text(NEW.sub("", Path(node.config).read_text()))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of it."""
        command = [sys.executable, *self.program, *words, "--config", self.config]
        return subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    if not has(PROJECT, RELEASES[LAST]):
        pytest.skip(NO_HISTORY)
    with serving(busybox_archive) as node:
        yield node


@pytest.fixture(scope="module")
def release(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(str(tmp_path_factory.mktemp("release")), node)


def test_the_last_release_refuses_to_start_and_this_one_finds_all_pods_again(node: Node, release: Release) -> None:
    pod = node.run_pod("pod")
    container = node.run(pod, "c", ["sh", "-c", "echo up; sleep 1000"])
    created = node.create(pod, "created", ["sleep", "1000"])
    pid, images = node.pid(container), node.client.ListImages().images
    node.stop()
    refused = release.run("serve")
    assert refused.returncode == 1
    assert "a newer criserver wrote it; start that one again" in refused.stderr
    assert "all containers keep running meanwhile" in refused.stderr
    node.start()
    assert (node.status(container).state, node.pid(container)) == (cri.CONTAINER_RUNNING, pid)
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
    node.client.StartContainer(container_id=created)
    assert node.sh(created, "ip -o addr show eth0") == node.sh(container, "ip -o addr show eth0")
    assert node.client.ListImages().images == images
    node.client.StopContainer(container_id=container, timeout=0)
    assert (node.status(container).exit_code, node.log(container)) == (137, "up\n")


def test_after_a_reset_with_images_the_last_release_serves(node: Node, release: Release, busybox_archive: str) -> None:
    """The way back of docs/operating.md."""
    node.run(node.run_pod("pod"), "c", ["sleep", "1000"])
    node.stop()
    reset = [sys.executable, "-m", "criserver", "reset", "--yes", "--images", "--grace", "0", "--config", node.config]
    subprocess.run(reset, check=True, timeout=120 * SLOWNESS)
    assert os.listdir(node.root) == []
    here = node.program, node.config
    node.program, node.config = release.program, release.config
    try:
        node.start()
        assert node.client.Version().runtime_version == LAST
        import_image(node, busybox_archive)
        container = node.run(node.run_pod("older"), "c", ["sleep", "1000"])
        pid = node.pid(container)
        node.stop()
    finally:
        node.program, node.config = here
        node.start()
    assert (node.status(container).state, node.pid(container)) == (cri.CONTAINER_RUNNING, pid)
