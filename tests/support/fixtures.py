"""Nodes for the tests, and the check that a test leaves nothing on the host."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from criserver.runtime import cgroups
from tests.support.node import BRIDGE, NETWORK, SCRATCH, SUBNET, Node, cgroups_of_pods, processes
from tests.support.waiting import SLOWNESS, eventually


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # of the whole run, whatever directory they are in
        if os.geteuid() != 0 and not item.nodeid.startswith("tests/unit/"):
            item.add_marker(pytest.mark.skip(reason="needs root: real mounts, namespaces and containers"))


def host_state(scratch: str) -> set[str]:
    """The mounts, links, cgroups, shims and rules of this run, which a test must not leave.

    ``scratch`` is the directory of this run's temporary directories. Those of other runs on this machine do not count.
    """
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        points = [line.split()[4] for line in f]
    found = {"mount " + point for point in points if point.startswith((SCRATCH, scratch))}
    found |= {"link " + name for name in os.listdir("/sys/class/net") if name == BRIDGE or _is_stray(name)}
    found |= {"cgroup " + path for path in cgroups_of_pods()}
    found |= {f"process {pid} {words}" for pid, words in processes() if f" {SCRATCH}" in words}
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False).stdout
    ours = (f'\\"{NETWORK}\\"', SUBNET.removesuffix("0.0/16"))
    found |= {"rule " + line for line in rules.splitlines() if any(word in line for word in ours)}
    return found


def _is_stray(link: str) -> bool:
    """Whether it is the node's end of a veth pair and in no bridge."""
    return link.startswith("veth") and not os.path.exists(f"/sys/class/net/{link}/master")


@pytest.fixture(scope="module", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the module that leaves something behind."""
    scratch = str(tmp_path_factory.getbasetemp())
    before = host_state(scratch)
    with parent_cgroup_kept():
        yield
    # 1. The kernel deletes a veth some time after its network namespace.
    # 2. Another runtime's veth joins its bridge some time after it is made.
    deadline = time.monotonic() + 60 * SLOWNESS
    while (left := host_state(scratch) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


@contextmanager
def parent_cgroup_kept() -> Iterator[None]:
    """The parent of all pods' cgroups is not empty: the daemon of another run on this machine would remove it.

    This would fail the start of a container whose cgroup is made in that moment.
    """
    name = f"{NETWORK}-{secrets.token_hex(4)}"  # runs in PID namespaces may have the same NETWORK
    kept = [f"{root}{cgroups.OWN}/{name}" for root in set(cgroups.roots().values())] if os.geteuid() == 0 else []
    for path in kept:
        eventually(partial(_is_made, path))
    yield
    for path in kept:
        os.rmdir(path)
    cgroups.remove_own()


def _is_made(cgroup: str) -> bool:
    with suppress(FileNotFoundError):  # the other run removes the parent in this moment
        os.makedirs(cgroup, exist_ok=True)
    return os.path.isdir(cgroup)


@pytest.fixture(scope="session")
def busybox_archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An OCI archive of the host's busybox, named localhost/busybox:latest."""
    from tests.support.imagebuilder import busybox_image, write_archive

    path = str(tmp_path_factory.mktemp("images") / "busybox.tar")
    write_archive(busybox_image(), path, "localhost/busybox:latest")
    return path


@contextmanager
def serving(archive: str, runtimes: str = "") -> Iterator[Node]:
    """A running daemon with the images of an archive, which is undone at the end of the block."""
    node = Node(runtimes)
    try:
        node.start()
        import_image(node, archive)
        yield node
    finally:
        node.close()


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    """A running daemon with the busybox image."""
    with serving(busybox_archive) as node:
        yield node


@pytest.fixture(autouse=True)
def clean_pods(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on a shared node: remove its pods. Nothing of them and no error in the log may be left."""
    yield
    if "node" in request.fixturenames:
        node: Node = request.getfixturevalue("node")
        if node.process is None or node.process.poll() is not None:
            node.start()
        node.remove_pods()
        shutil.rmtree(node.logs)
        os.mkdir(node.logs)
        assert node.settled() == []
        assert node.complaints() == []


def import_image(node: Node, path: str) -> None:
    """Import an archive by the operator's own command."""
    command = [sys.executable, "-m", "criserver", "image", "import", "--config", node.config, path]
    subprocess.run(command, check=True, capture_output=True)


RUNC = os.environ.get("CRISERVER_TEST_RUNC", "")


@pytest.fixture(scope="module")
def newer(busybox_archive: str) -> Iterator[Node]:
    """A daemon with the newer runc as a second handler."""
    if not RUNC:
        pytest.skip("CRISERVER_TEST_RUNC names no runc with id-mapped mounts (1.2 or newer)")
    node = Node(f'[runtimes.runc]\npath = "runc"\n[runtimes.newer]\npath = "{RUNC}"\n')
    try:
        os.chmod(node.base, 0o711)  # the pod's root has to get through, as it does through /run
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        node.close()
