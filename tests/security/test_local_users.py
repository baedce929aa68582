"""Users of the node who are not root, and containers: what they reach of the daemon's files and mounts."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import sandbox_files
from snapshotter import mounts
from tests.support.fixtures import import_image, newer
from tests.support.imagebuilder import Dir, File, Link, busybox_image, write_archive
from tests.support.node import Node, refused
from tests.support.pods import run, secured, userns

__all__ = ["newer"]

INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
SLEEP = ["sleep", "1000"]
IMAGE = "localhost/volumes:latest"


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def load(node: Node, directory: Path, name: str = IMAGE, volumes: tuple[str, ...] = ("/data",), **layer: Any) -> None:
    """Import an image with these volumes; the keywords are files, "_" for "/"."""
    files = {path.replace("_", "/"): member for path, member in layer.items()}
    files |= {"data": Dir(0o1777), "data/su": File(b"#!/bin/sh\n", 0o4755)}
    image = busybox_image(config={"Volumes": {path: {} for path in volumes}}, layers=[files])
    write_archive(image, f"{directory}/image.tar", name)
    import_image(node, f"{directory}/image.tar")


def as_nobody(script: str) -> subprocess.CompletedProcess[str]:
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, **nobody)  # type: ignore[call-overload]


def options(node: Node, container: str, place: str) -> set[str]:
    """The options of the mount at a place of the container."""
    lines = [line.split() for line in node.sh(container, "cat /proc/self/mountinfo").splitlines()]
    return set(next(line for line in reversed(lines) if line[4] == place)[5].split(","))


def test_nobody_but_root_passes_below_root_and_state(node: Node, pod: str, tmp_path: Path) -> None:
    """CVE-2020-8557, CVE-2021-21284, CVE-2021-41091, CVE-2021-41103, CVE-2024-25621."""
    load(node, tmp_path)
    shared = node.run_pod("shared", linux=cri.LinuxPodSandboxConfig())
    volume = cri.Mount(container_path="/image", image=cri.ImageSpec(image=IMAGE), readonly=True)
    container = node.run(pod, "c", SLEEP, image=IMAGE, mounts=[volume], tty=True, stdin=True)
    node.run(shared, "d", SLEEP)
    node.sh(container, "echo secret > /data/file; echo secret > /dev/shm/file; chmod 644 /data/file; id")
    reached = (f"{node.root}/volumes", f"{node.root}/volumes/{container}/0/file", f"{node.state}/sandboxes/{pod}/shm")
    for path in (node.root, node.state, *reached):
        assert os.path.lexists(path)
        assert "ermission denied" in as_nobody(f"ls {path}").stderr
    assert as_nobody(f"{node.root}/volumes/{container}/0/su").returncode in (126, 127)
    assert "ermission denied" in as_nobody(f"echo x > {node.state}/sandboxes/{pod}/shm/file").stderr
    kept = [entry.path for top in (node.root, node.state) for entry in os.scandir(top) if entry.is_dir()]
    assert [path for path in (node.root, node.state, *kept) if os.stat(path).st_mode & stat.S_IRWXO] == []
    own = (f"{node.root}/volumes/{container}", f"{node.root}/sandboxes/{pod}", f"{node.state}/containers/{container}")
    assert [oct(stat.S_IMODE(os.stat(path).st_mode)) for path in own] == ["0o700"] * 3


def test_directories_of_an_earlier_release_are_closed(node: Node, pod: str) -> None:
    node.stop()
    for path in (node.root, node.state, f"{node.state}/containers", f"{node.state}/sandboxes"):
        os.chmod(path, 0o755)
    node.start()
    for path in (node.root, node.state, f"{node.state}/containers", f"{node.state}/sandboxes"):
        assert os.stat(path).st_mode & stat.S_IRWXO == 0
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY


def test_what_is_mounted_from_there_has_no_devices_and_gives_nobody_more_rights(
    node: Node, pod: str, tmp_path: Path
) -> None:
    load(node, tmp_path)
    volume = cri.Mount(container_path="/image", image=cri.ImageSpec(image=IMAGE), readonly=True)
    container = node.run(pod, "c", SLEEP, image=IMAGE, mounts=[volume])
    for place in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm"):
        assert options(node, container, place) >= {"nosuid", "nodev", "noexec"}
    for place in ("/data", "/image"):
        assert options(node, container, place) >= {"nosuid", "nodev"}
    assert node.sh(container, "echo x > /data/file; cp /bin/busybox /data/; /data/busybox echo runs") == "runs\n"


def test_a_container_fills_no_memory_of_the_nodes(node: Node, pod: str) -> None:
    """What a container can write to is on disk, or has a bound."""
    container = node.run(pod, "c", SLEEP)
    before = os.statvfs(node.state)
    for name in ("hostname", "hosts", "resolv.conf"):
        node.sh(container, f"dd if=/dev/zero of=/etc/{name} bs=1M count=20 2>/dev/null")
    after = os.statvfs(node.state)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize < 1 << 20
    assert os.path.getsize(f"{node.root}/sandboxes/{pod}/hostname") == 20 << 20
    node.remove_pods()
    assert os.listdir(f"{node.root}/sandboxes") == []


def test_files_of_an_earlier_release_are_taken_over(node: Node, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "files"
    old.mkdir()
    for name in ("hosts", "hostname", "resolv.conf"):
        (old / name).write_text(f"{name} of before")
    for _ in range(2):
        sandbox_files.adopt(str(new), str(old), "")
    assert (new / "hosts").read_text() == "hosts of before"
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    sandbox_files.remove(str(new), str(old))
    assert not new.exists()
    assert not old.exists()


# Mounts of the runtime's own in a mount that the node sees


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[str]:
    """A directory like the node's /dev, on a shared mount."""
    path = str(tmp_path / "dev")
    os.mkdir(path)
    mounts.mount("dev", path, "tmpfs", 0, "mode=755")
    subprocess.run(["mount", "--make-shared", path], check=True)
    for name, minor in (("null", 3), ("zero", 5), ("urandom", 9), ("console", 1)):
        os.mknod(f"{path}/{name}", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    try:
        yield path
    finally:
        for point in (*mounts.mounts_below(path), path):
            mounts.unmount(point)


def privileged_pod(node: Node) -> str:
    security = cri.LinuxSandboxSecurityContext(
        namespace_options=cri.NamespaceOption(pid=cri.CONTAINER), privileged=True
    )
    return node.run_pod("privileged", linux=cri.LinuxPodSandboxConfig(security_context=security))


@pytest.mark.parametrize("kind", cri.MountPropagation.values())
def test_the_nodes_dev_stays_as_it_is(node: Node, dev: str, kind: cri.MountPropagation) -> None:
    pod = privileged_pod(node)
    before = sorted(os.listdir(dev))
    mount = cri.Mount(container_path="/dev", host_path=dev, propagation=kind)
    container = node.run(pod, "c", SLEEP, mounts=[mount], **secured(privileged=True))
    assert sorted(os.listdir(dev)) == before
    assert mounts.mounts_below(dev) == []
    assert "zero" in node.sh(container, "ls /dev; echo x > /dev/null")
    node.client.StopContainer(container_id=container)
    node.client.RemoveContainer(container_id=container)
    assert sorted(os.listdir(dev)) == before
    assert mounts.mounts_below(dev) == []


@pytest.mark.parametrize("place", ["/etc", "/sys"])
def test_no_mount_of_ours_travels_to_the_node(node: Node, dev: str, place: str) -> None:
    pod = privileged_pod(node)
    mount = cri.Mount(container_path=place, host_path=dev, propagation=cri.PROPAGATION_BIDIRECTIONAL)
    container = node.run(pod, "c", SLEEP, mounts=[mount], **secured(privileged=True))
    assert mounts.mounts_below(dev) == []
    node.client.StopContainer(container_id=container)
    node.client.RemoveContainer(container_id=container)
    assert mounts.mounts_below(dev) == []


@pytest.mark.parametrize(
    ("place", "fields", "words"),
    [
        ("/", {}, "a mount at / with Bidirectional"),
        ("/dev", {"tty": True}, "/dev/console of the container lies in its mount /dev"),
        ("/var", secured(masked_paths=["/var/../var/lib/x"]), "/var/lib/x of the container lies in"),
        ("/var", secured(readonly_paths=["/var"]), "/var of the container lies in"),
        ("/way", secured(masked_paths=["/dev/x"]), "/dev/x of the container lies in its mount /dev"),
    ],
)
def test_what_would_be_covered_on_the_node_is_refused(
    node: Node,
    pod: str,
    dev: str,
    tmp_path: Path,
    place: str,
    fields: dict[str, bool | cri.LinuxContainerConfig],
    words: str,
) -> None:
    load(node, tmp_path, way=Link("dev"))
    mount = cri.Mount(container_path=place, host_path=dev, propagation=cri.PROPAGATION_BIDIRECTIONAL)
    with refused(INVALID, words):
        node.create(pod, "c", SLEEP, image=IMAGE, mounts=[mount], **fields)
    assert mounts.mounts_below(dev) == []


def test_the_kernels_places_are_no_volumes(node: Node, pod: str, tmp_path: Path) -> None:
    volumes = ("/dev", "/proc/sys", "/sys/fs/cgroup", "/way", "/way/deeper", "/data")
    load(node, tmp_path, "localhost/kernels:1", volumes=volumes, way=Link("/dev"), dev=Dir(), dev_null=Link("/shown"))
    container = node.run(pod, "c", SLEEP, image="localhost/kernels:1", **secured(masked_paths=["/etc/group"]))
    assert node.sh(container, "cat /etc/group; test -c /dev/null && echo device") == "device\n"
    assert os.listdir(f"{node.root}/volumes/{container}") == ["0"]


@pytest.mark.parametrize("place", ["/dev", "/way", "/dev/null"])
def test_a_mount_of_a_pod_brings_the_null_device_or_hides_nothing(
    node: Node, pod: str, tmp_path: Path, place: str
) -> None:
    """CVE-2025-31133."""
    load(node, tmp_path, way=Link("dev"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "null").symlink_to("/etc/passwd")
    path = str(tmp_path / "dev" / "null") if place == "/dev/null" else str(tmp_path / "dev")
    mount = cri.Mount(container_path=place, host_path=path)
    with refused(FAILED, "no null device"):
        node.create(pod, "c", SLEEP, image=IMAGE, mounts=[mount], **secured(masked_paths=["/etc/group"]))
    os.unlink(tmp_path / "dev" / "null")
    os.mknod(tmp_path / "dev" / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    container = node.run(pod, "c", SLEEP, image=IMAGE, mounts=[mount], **secured(masked_paths=["/etc/group"]))
    assert node.sh(container, "cat /etc/group") == ""


def test_the_root_of_a_user_namespace_gets_through_and_nobody_else(newer: Node, tmp_path: Path) -> None:
    load(newer, tmp_path)
    pod, container = run(newer, "userns", userns(), image=IMAGE)
    assert newer.sh(container, "id -u; touch /data/x; stat -c %u /data/x; cat /etc/hostname") == "0\n0\nuserns\n"
    for path in (newer.root, newer.state, f"{newer.state}/containers"):
        assert os.stat(path).st_mode & stat.S_IRWXO == 0
        assert "ermission denied" in as_nobody(f"ls {path}/.").stderr
    newer.kill()
    newer.start()
    again = newer.run(pod, "again", SLEEP, image=IMAGE)
    assert newer.sh(again, "id -u") == "0\n"
    newer.remove_pods()
    assert stat.S_IMODE(os.stat(newer.state).st_mode) == 0o700
    assert newer.settled() == []
