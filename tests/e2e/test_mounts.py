"""Recursive read-only mounts, images as volumes, the volumes of an image, and targets of mounts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.imagebuilder import File, Layer, Link, busybox_image, write_archive
from tests.support.node import Node, refused


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


@pytest.fixture
def volume(node: Node, tmp_path: Path) -> str:
    """An image with a file and a directory, by name."""
    layer: Layer = {"data/inner": b"from the image", "data/tool": File(b"#!/bin/sh\necho ran", 0o755)}
    write_archive(busybox_image(layers=[layer]), str(tmp_path / "v.tar"), "localhost/volume:1")
    import_image(node, str(tmp_path / "v.tar"))
    return "localhost/volume:1"


def image_mount(name: str, sub_path: str = "", readonly: bool = True) -> cri.Mount:
    return cri.Mount(container_path="/vol", readonly=readonly, image=cri.ImageSpec(image=name), image_sub_path=sub_path)


def test_an_image_as_a_volume(node: Node, pod: str, volume: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], mounts=[image_mount(volume)])
    assert node.sh(container, "cat /vol/data/inner; /vol/data/tool") == "from the imageran\n"
    assert "Read-only" in node.sh(container, "touch /vol/x 2>&1 || true")
    (mount,) = node.status(container).mounts
    image_id = node.client.ImageStatus(image=cri.ImageSpec(image=volume)).image.id
    assert mount.image.image_ref == image_id
    node.client.RemoveImage(image=cri.ImageSpec(image=volume))
    assert node.sh(container, "cat /vol/data/inner") == "from the image"


def test_a_path_of_an_image_as_a_volume(node: Node, pod: str, volume: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], mounts=[image_mount(volume, "data")])
    assert node.sh(container, "ls /vol") == "inner\ntool\n"
    node.client.StopContainer(container_id=container, timeout=0)
    node.client.RemoveContainer(container_id=container)
    assert os.listdir(f"{node.root}/snapshots/active") == []


@pytest.mark.parametrize(
    ("mount", "code", "word"),
    [
        (image_mount("localhost/absent:1"), grpc.StatusCode.NOT_FOUND, "pull it first"),
        (image_mount("localhost/volume:1", readonly=False), grpc.StatusCode.INVALID_ARGUMENT, "readonly"),
        (image_mount("localhost/volume:1", "nowhere"), grpc.StatusCode.NOT_FOUND, "'nowhere'"),
        (image_mount("localhost/volume:1", "../etc"), grpc.StatusCode.INVALID_ARGUMENT, "../etc"),
        (
            cri.Mount(container_path="/v", host_path="/tmp", recursive_read_only=True),
            grpc.StatusCode.INVALID_ARGUMENT,
            "recursive_read_only",
        ),
        (
            cri.Mount(
                container_path="/v",
                host_path="/tmp",
                readonly=True,
                recursive_read_only=True,
                propagation=cri.PROPAGATION_BIDIRECTIONAL,
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "PROPAGATION_PRIVATE",
        ),
    ],
)
def test_a_mount_that_is_refused(
    node: Node, pod: str, volume: str, mount: cri.Mount, code: grpc.StatusCode, word: str
) -> None:
    with refused(code, word):
        node.create(pod, "c", ["true"], mounts=[mount])
    assert node.client.ListContainers().containers == []
    assert os.listdir(f"{node.state}/containers") == []


def test_a_recursive_read_only_mount(node: Node, pod: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "rro", str(inner)], check=True)
    try:
        mounts = [
            cri.Mount(container_path="/ro", host_path=str(tmp_path), readonly=True),
            cri.Mount(container_path="/rro", host_path=str(tmp_path), readonly=True, recursive_read_only=True),
        ]
        container = node.run(pod, "c", ["sleep", "1000"], mounts=mounts)
        assert node.sh(container, "touch /ro/inner/x && echo written") == "written\n"
        assert "Read-only" in node.sh(container, "touch /rro/inner/y 2>&1 || true")
        handlers = {h.name: h.features.recursive_read_only_mounts for h in node.client.Status().runtime_handlers}
        assert handlers == {"": True, "runc": True}
        node.client.StopContainer(container_id=container, timeout=0)
    finally:
        subprocess.run(["umount", str(inner)], check=True)


def test_links_of_an_image_at_the_paths_of_mounts(node: Node, pod: str, tmp_path: Path) -> None:
    """A link below another mount is covered by it. The pod's own files follow a link to the kubelet's mount there."""
    layer: Layer = {
        "dev/shm": Link("/run/shm"),
        "data/link": Link("/elsewhere"),
        "etc/hosts": Link("/hosts"),
        "etc/hostname": Link("/real/hostname"),
        "etc/resolv.conf": Link("../run/systemd/resolve/stub-resolv.conf"),
    }
    write_archive(busybox_image(layers=[layer]), str(tmp_path / "l.tar"), "localhost/links:1")
    import_image(node, str(tmp_path / "l.tar"))
    for name in ("memory", "volume", "below"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "hosts").write_text("10.0.0.1 alias\n")
    places = {"/dev/shm": "memory", "/data": "volume", "/data/link": "below", "/etc/hosts": "hosts"}
    requested = [cri.Mount(container_path=path, host_path=str(tmp_path / name)) for path, name in places.items()]
    script = "ls /dev/shm /data/link && cat /etc/hosts /etc/hostname && grep -c nameserver /etc/resolv.conf"
    container = node.run(pod, "c", ["sh", "-c", script], image="localhost/links:1", mounts=requested)
    seen = "/data/link:\nbelow\n\n/dev/shm:\nmemory\n10.0.0.1 alias\npod\n1\n"
    node.wait(container)
    assert node.log(container) == seen
    spec = json.loads(node.client.ContainerStatus(container_id=container, verbose=True).info["info"])["runtimeSpec"]
    # Some versions of runc refuse to mount at a link that leads nowhere (opencontainers/runc#5090).
    assert "/run/systemd/resolve/stub-resolv.conf" in [mount["destination"] for mount in spec["mounts"]]


def test_the_volumes_of_an_image_are_copied_up_and_writable_under_a_read_only_root(
    node: Node, pod: str, tmp_path: Path
) -> None:
    layer: Layer = {"var/data/file": b"seed", "var/data/sub/deep": File(b"deep", 0o640)}
    image = busybox_image(layers=[layer], config={"Volumes": {"/var/data": {}, "/made/up": {}, "/given": {}}})
    write_archive(image, str(tmp_path / "i.tar"), "localhost/volumes:1")
    import_image(node, str(tmp_path / "i.tar"))
    (tmp_path / "host").mkdir()
    security = cri.LinuxContainerSecurityContext(readonly_rootfs=True)
    container = node.run(
        pod,
        "c",
        ["sleep", "1000"],
        image="localhost/volumes:1",
        linux=cri.LinuxContainerConfig(security_context=security),
        mounts=[cri.Mount(container_path="/given", host_path=str(tmp_path / "host"))],
    )
    assert node.sh(container, "cat /var/data/file /var/data/sub/deep; stat -c %a /var/data/sub/deep") == "seeddeep640\n"
    node.sh(container, "echo x > /var/data/new; echo y > /made/up/new; echo z > /given/new")
    assert (tmp_path / "host" / "new").read_text() == "z\n"
    assert "Read-only" in node.sh(container, "touch /var/other 2>&1 || true")
    node.client.StopContainer(container_id=container, timeout=0)
    node.client.RemoveContainer(container_id=container)
    assert os.listdir(f"{node.root}/volumes") == []


def test_a_container_that_sees_the_processes_of_another(node: Node, pod: str) -> None:
    target = node.run(pod, "target", ["sleep", "1234"])
    options = cri.NamespaceOption(pid=cri.TARGET, target_id=target)
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=options))
    debugger = node.run(pod, "debugger", ["sleep", "1000"], linux=linux)
    assert "sleep 1234" in node.sh(debugger, "ps -o args")
    other = node.run_pod("other")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "another pod"):
        node.create(other, "c", ["true"], linux=linux)
    node.client.StopContainer(container_id=target, timeout=0)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited, not running"):
        node.create(pod, "late", ["true"], linux=linux)
