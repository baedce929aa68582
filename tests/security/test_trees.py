"""Trees that containers make can always be removed, whatever is in them.

With the standard library's recursive helpers a container that nested a thousand directories could not be removed any
more, and what it left kept the daemon from starting.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from snapshotter import file_tree, mounts, removal
from tests.support.fixtures import import_image, serving
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.layers import archive, item, symlink
from tests.support.node import Node, cgroup
from tests.support.waiting import SLOWNESS, eventually

VOLUME = "localhost/volume:latest"
# From below upwards, in pieces that a path can name: busybox's cd has no longer ones.
NEST = (
    "p=x; i=1; while [ $i -lt 500 ]; do p=$p/d; i=$((i+1)); done; mkdir t; i=0; "
    "while [ $i -lt {depth} ]; do mkdir -p $p && mv t $p/d && mv x t || exit 9; i=$((i+500)); done; echo nested"
)
# Cgroups are not moved.
NEST_CGROUPS = "i=0; while [ $i -lt {depth} ]; do mkdir d && cd d || exit 9; i=$((i+1)); done; echo nested"
WAIT = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
DEPTHS = [1500, 6000]


@pytest.fixture(scope="module")
def volume_archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a volume."""
    path = str(tmp_path_factory.mktemp("images") / "volume.tar")
    write_archive(busybox_image(config={"Volumes": {"/data": {}}}), path, VOLUME)
    return path


@pytest.fixture(scope="module")
def prepared(node: Node, volume_archive: str) -> Node:
    import_image(node, volume_archive)
    return node


@pytest.fixture
def own_node(nothing_left: None, volume_archive: str) -> Iterator[Node]:
    """A node of the test's own."""
    with serving(volume_archive) as node:
        yield node
        # What a test that fails leaves may be deeper than the fixtures can delete.
        if node.process is not None and node.process.poll() is None:
            node.remove_pods()
            node.stop()
        for name in ("volumes", "snapshots", "strange"):
            removal.remove_path(f"{node.root}/{name}")


def nested(node: Node, pod: str, where: str, depth: int, name: str = "deep") -> str:
    """A running container that has nested directories in ``where``."""
    script = f"mkdir -p {where}; cd {where}; {NEST.format(depth=depth)}; {WAIT}"
    container = node.run(pod, name, ["sh", "-c", script], image=VOLUME)
    wait_until_nested(node, container)
    return container


def wait_until_nested(node: Node, container: str) -> None:
    eventually(lambda: "nested" in node.log(container) or node.status(container).state != cri.CONTAINER_RUNNING, 180)
    assert "nested" in node.log(container), node.log(container)


def volumes(node: Node) -> list[str]:
    try:
        return os.listdir(f"{node.root}/volumes")
    except FileNotFoundError:
        return []


def reset(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "criserver", "reset", "--config", node.config, "--yes", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS, check=False)


@pytest.mark.parametrize("where", ["/data", "/layer"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_container_with_a_deep_tree_is_removed(prepared: Node, where: str, depth: int) -> None:
    node = prepared
    pod = node.run_pod("deep")
    container = nested(node, pod, where, depth)
    node.client.RemoveContainer(container_id=container)
    assert node.client.ListContainers().containers == []
    assert volumes(node) == []
    assert os.listdir(f"{node.root}/snapshots/staging") == []
    assert os.listdir(f"{node.root}/snapshots/active") == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_pod_with_a_deep_tree_is_removed(prepared: Node, depth: int) -> None:
    node = prepared
    pod = node.run_pod("deep")
    nested(node, pod, "/data", depth)
    nested(node, pod, "/layer", depth, "other")
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert node.client.ListPodSandbox().items == []
    assert volumes(node) == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_a_killed_daemon_left_of_a_deep_tree_is_swept(prepared: Node, depth: int) -> None:
    """Recovery: the record is lost, as an intention that was not written down is; the daemon starts, and sweeps."""
    node = prepared
    pod = node.run_pod("deep")
    container = nested(node, pod, "/data", depth)
    node.client.StopContainer(container_id=container, timeout=10)
    node.kill()
    # As a removal that was cut off behind its record.
    strange = f"{node.root}/volumes/{'e' * 64}"
    os.rename(f"{node.root}/volumes/{container}", strange)
    os.makedirs(f"{node.root}/volumes/{container}/0")
    node.start()
    assert volumes(node) == [container]
    node.client.RemoveContainer(container_id=container)
    assert volumes(node) == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_reset_removes_a_deep_tree(own_node: Node, depth: int) -> None:
    node = own_node
    pod = node.run_pod("deep")
    nested(node, pod, "/data", depth)
    nested(node, pod, "/layer", depth, "other")
    node.kill()
    # Beside a tree that no record has: with --images all goes.
    os.makedirs(f"{node.root}/volumes/strange")
    fd = os.open(f"{node.root}/volumes/strange", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    done = reset(node, "--images")
    assert (done.returncode, done.stdout) == (0, "removed 1 pod and 2 containers\n"), done.stderr
    assert os.listdir(node.root) == []
    assert not os.path.exists(node.state)


def test_reset_names_what_cannot_be_deleted(own_node: Node) -> None:
    node = own_node
    node.kill()
    os.makedirs(f"{node.root}/volumes/strange")
    stays = Path(f"{node.root}/volumes/strange/stays")
    stays.touch()
    mounts.mount(f"{node.base}/config.toml", str(stays), None, mounts.MS_BIND)
    try:
        done = reset(node, "--images")
        assert done.returncode == 1
        assert f"left: mount {stays}" in done.stderr
    finally:
        mounts.unmount(str(stays))
    assert reset(node, "--images").returncode == 0


def test_attributes_that_forbid_deletion_keep_nothing(prepared: Node) -> None:
    """CAP_LINUX_IMMUTABLE is an ordinary capability to ask for."""
    node = prepared
    pod = node.run_pod("fast")
    script = "for d in /data /layer; do mkdir -p $d/a; echo x > $d/a/f; done"
    container = node.run(pod, "fast", ["sh", "-c", script], image=VOLUME)
    node.wait(container)
    # What such a container does itself where its image has the program.
    data, upper = f"{node.root}/volumes/{container}/0", f"{node.root}/snapshots/active/{container}/fs"
    for attribute, path in (
        ("+i", f"{data}/a/f"),
        ("+a", f"{data}/a"),
        ("+i", data),
        ("+a", f"{upper}/layer/a/f"),
        ("+i", f"{upper}/layer/a"),
        ("+i", upper),
    ):
        if subprocess.run(["chattr", attribute, path], capture_output=True, check=False).returncode:
            pytest.skip("the file system has no such attributes")
    node.client.RemoveContainer(container_id=container)
    assert volumes(node) == []
    assert os.listdir(f"{node.root}/snapshots/staging") == []


def test_removal_that_fails_is_an_error_and_can_be_tried_again(prepared: Node) -> None:
    """The record stays: what is still there belongs to it. Nothing of what is mounted in the way is deleted."""
    node = prepared
    container = node.run(node.run_pod("kept"), "kept", ["true"], image=VOLUME)
    node.wait(container)
    elsewhere = Path(node.base, "elsewhere")
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    points = [f"{node.root}/volumes/{container}/0/point", f"{node.root}/snapshots/active/{container}/fs/point"]
    for point in points:
        os.mkdir(point)
        mounts.mount(str(elsewhere), point, None, mounts.MS_BIND)
    try:
        for _ in range(2):
            with pytest.raises(grpc.RpcError, match=r"a file system is mounted there; unmount it first.*/point"):
                node.client.RemoveContainer(container_id=container)
            assert [c.id for c in node.client.ListContainers().containers] == [container]
            assert os.listdir(elsewhere) == ["kept"]
        # Neither is a restart a way out: it says so, and serves.
        node.kill()
        node.start()
        assert [c.id for c in node.client.ListContainers().containers] == [container]
        staged = [p for p in mounts.mounts_below(node.root) if "/staging/" in p]
        assert staged == []
        assert os.listdir(elsewhere) == ["kept"]
    finally:
        for point in mounts.mounts_below(node.root):
            mounts.unmount(point)
    node.client.RemoveContainer(container_id=container)
    assert node.client.ListContainers().containers == []
    assert volumes(node) == []
    assert os.listdir(elsewhere) == ["kept"]


def test_one_bad_left_over_keeps_nobody_from_starting(own_node: Node) -> None:
    """Files where directories belong, directories where files do, names of nobody: and the rest is swept."""
    node = own_node
    good = node.run_pod("good")
    node.kill()
    hexes = "f" * 64
    for path in (
        f"{node.state}/ns/{hexes}",
        f"{node.state}/sandboxes/{hexes}",
        f"{node.state}/containers/{hexes}",
        f"{node.state}/runtimes/odd",
        f"{node.root}/volumes",
        f"{node.root}/snapshots/layers/99",
        f"{node.root}/snapshots/active/{hexes}",
        f"{node.root}/snapshots/staging/file",
    ):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()
    for path in (
        f"{node.state}/ns/{'a' * 64}/pid/d",
        f"{node.state}/ns/{'a' * 64}/other",
        f"{node.state}/sandboxes/{'a' * 64}/hosts/d",
        f"{node.state}/sandboxes/-rf/shm/d",
        f"{node.state}/containers/a\nb/rootfs/d",
        f"{node.state}/runtimes/runc/{'a' * 64}/state.json",
        f"{node.root}/content/ingest/0/d",
        f"{node.root}/content/blobs/sha256/{'0' * 64}/d",
        f"{node.root}/snapshots/active/{'b' * 64}/meta.json",
        f"{node.root}/snapshots/staging/d/d",
    ):
        os.makedirs(path)
    os.makedirs(os.path.join(os.fsencode(node.state), b"containers", b"\xff"))
    # And one that stays.
    stays = f"{node.state}/sandboxes/{'c' * 64}/point"
    os.makedirs(stays)
    mounts.mount("tmpfs", stays, "tmpfs")
    Path(stays, "kept").touch()
    try:
        node.start()
        assert os.listdir(stays) == ["kept"]
    finally:
        mounts.unmount(stays)
    left = {os.path.basename(path) for path in node.leftovers() if not path.startswith("ipam")}
    assert left <= {good, f"criserver-{good}", "c" * 64, "a" * 64, "ipc", "uts", "shm"}, left
    assert "a leftover cannot be removed" in node.daemon_log()
    node.client.RemovePodSandbox(pod_sandbox_id=good)
    node.stop()
    node.start()
    eventually(lambda: not [path for path in node.leftovers() if "/runtimes/" not in path])


@pytest.mark.parametrize("whose", ["pod", "container"])
def test_a_deep_cgroup_tree_is_removed(prepared: Node, whose: str) -> None:
    """A privileged container sees all cgroups, and may nest more of them than a path can name."""
    node = prepared
    pod = node.run_pod("groups", linux=privileged_pod())
    own = cgroup(pod, "").rstrip("/")
    root = cgroups.roots().get("pids") or cgroups.roots()[""]
    script = f"cd /host{own}{'/*/' if whose == 'container' else ''} && {NEST_CGROUPS.format(depth=1900)}; {WAIT}"
    security = cri.LinuxContainerSecurityContext(privileged=True)
    container = node.run(
        pod,
        "groups",
        ["sh", "-c", script],
        image=VOLUME,
        linux=cri.LinuxContainerConfig(security_context=security),
        mounts=[cri.Mount(container_path="/host", host_path=root)],
    )
    wait_until_nested(node, container)
    node.client.RemoveContainer(container_id=container)
    assert whose == "pod" or not os.path.exists(root + cgroup(pod, container))
    assert os.listdir(f"{node.state}/runtimes/runc") == []
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert not os.path.exists(root + own)


def privileged_pod() -> cri.LinuxPodSandboxConfig:
    context = cri.LinuxSandboxSecurityContext(privileged=True, namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
    return cri.LinuxPodSandboxConfig(security_context=context)


def test_the_volume_of_an_image_that_is_deeper_than_a_path(own_node: Node, tmp_path: Path) -> None:
    """Layers go deeper than a path by links; copying the volume takes it as it is."""
    node = own_node
    entries = []
    above = "data"
    for number in range(10):
        part = "/".join(["d"] * 500)
        entries.append(item(f"{above}/{part}/f", b"x"))
        entries.append(symlink(f"l{number}", f"{above}/{part}"))
        above = f"l{number}"
    layer = archive(*entries)
    path = str(tmp_path / "deep.tar")
    write_archive(busybox_image(config={"Volumes": {"/data": {}}}, layers=[layer]), path, "localhost/deep:latest")
    import_image(node, path)
    pod = node.run_pod("volume")
    container = node.create(pod, "volume", ["true"], image="localhost/deep:latest")
    assert file_tree.measure(f"{node.root}/volumes/{container}/0").inodes == 1 + 5000 + 10
    node.client.RemoveContainer(container_id=container)
    assert volumes(node) == []


def test_cgroups_that_no_path_can_name_are_removed(prepared: Node) -> None:
    """The OCI runtime gives up on them: a program in a container has no such bound as a shell's cd."""
    node = prepared
    pod = node.run_pod("long")
    container = node.run(pod, "long", ["sh", "-c", WAIT], image=VOLUME)
    tops = {root + cgroup(pod, container) for root in cgroups.roots().values()}
    (top, *_) = sorted(path for path in tops if os.path.isdir(path))
    fd = os.open(top, os.O_RDONLY)
    for _ in range(100):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    node.client.StopContainer(container_id=container, timeout=10)
    node.client.RemoveContainer(container_id=container)
    assert not os.path.exists(top)
    assert os.listdir(f"{node.state}/runtimes/runc") == []
