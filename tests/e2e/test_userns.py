"""Pods with a user namespace of their own. They need runc 1.2 or newer: CRISERVER_TEST_RUNC names one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image, newer
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import Node, refused
from tests.support.pods import BASE, run, secured, userns
from tests.support.waiting import eventually

__all__ = ["newer"]


@pytest.mark.parametrize(
    ("linux", "words"),
    [
        (userns(uids=[(0, BASE, 10), (10, BASE + 10, 10)]), ["2 mappings"]),
        (userns(uids=[]), ["0 mappings"]),
        (userns(uids=[(1, BASE, 10)]), ["ID 0 must be mapped"]),
        (userns(uids=[(0, BASE, 0)]), ["length = 0"]),
        (userns(mode=cri.CONTAINER), ["CONTAINER"]),
        (userns(mode=cri.TARGET), ["TARGET"]),
        (userns(mode=cri.NODE), ["NODE"]),
    ],
)
def test_mappings_that_are_refused(node: Node, linux: cri.LinuxPodSandboxConfig, words: list[str]) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        node.run_pod("bad", linux=linux)
    assert node.client.ListPodSandbox().items == []


def test_a_handler_that_cannot_says_so(node: Node) -> None:
    features = {h.name: h.features.user_namespaces for h in node.client.Status().runtime_handlers}
    if features["runc"]:
        pytest.skip("this runc has id-mapped mounts")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "user namespace", "runc 1.2"):
        node.run_pod("bad", linux=userns())
    assert node.settled() == []


def test_root_in_the_pod_is_nobody_on_the_node(newer: Node, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("of the host's root")
    mapped = [cri.IDMapping(container_id=0, host_id=BASE, length=65536)]
    mounts = [
        cri.Mount(container_path="/plain", host_path=str(tmp_path)),
        cri.Mount(container_path="/mapped", host_path=str(tmp_path), uidMappings=mapped, gidMappings=mapped),
    ]
    os.chmod(tmp_path, 0o755)
    pod, container = run(newer, "userns", userns(), mounts=mounts)
    assert newer.sh(container, "cat /proc/self/uid_map").split() == ["0", str(BASE), "65536"]
    assert newer.sh(container, "cat /proc/sys/net/ipv4/ping_group_range").split() == ["0", "65535"]
    assert newer.sh(container, "id -u; stat -c %u /bin /etc/passwd /") == "0\n0\n0\n0\n"
    assert newer.sh(container, "echo x > /etc/new && stat -c %u /etc/new") == "0\n"
    upper = Path(f"{newer.root}/snapshots/active/{container}/fs/etc/new")
    assert upper.stat().st_uid == BASE
    assert newer.sh(container, "stat -c %u /plain/plain /mapped/plain") == "65534\n0\n"
    newer.sh(container, "echo y > /mapped/made")
    assert (tmp_path / "made").stat().st_uid == 0
    assert "denied" in newer.sh(container, "touch /plain/x 2>&1 || true")
    assert newer.sh(container, "echo shm > /dev/shm/x && cat /dev/shm/x") == "shm\n"
    assert "eth0" in newer.sh(container, "ip link")
    status = newer.client.PodSandboxStatus(pod_sandbox_id=pod).status
    assert status.linux.namespaces.options.userns_options.uids[0].host_id == BASE
    newer.remove_pods()
    assert newer.settled() == []


@pytest.mark.parametrize("pid", [cri.CONTAINER, cri.POD])
def test_the_nodes_network_within(newer: Node, pid: cri.NamespaceMode) -> None:
    assert newer.client.Status().features.user_namespaces_host_network
    linux = userns()
    linux.security_context.namespace_options.network = cri.NODE
    linux.security_context.namespace_options.pid = pid
    _, container = run(newer, f"network-{pid}", linux)
    assert newer.sh(container, "cat /proc/self/uid_map").split() == ["0", str(BASE), "65536"]
    assert newer.sh(container, "readlink /proc/self/ns/net") == f"{os.readlink('/proc/self/ns/net')}\n"
    assert newer.sh(container, "ls /sys/class/net").split() == sorted(os.listdir("/sys/class/net"))
    (options,) = newer.sh(container, "awk '$2 == \"/sys\" {print $4}' /proc/self/mounts").split()
    assert "ro" in options.split(",")
    newer.remove_pods()
    assert newer.settled() == []


def test_a_shared_pid_namespace_within(newer: Node) -> None:
    linux = userns()
    linux.security_context.namespace_options.pid = cri.POD
    pod, one = run(newer, "pids", linux)
    two = newer.run(pod, "two", ["sleep", "1001"])
    assert "sleep 1000" in newer.sh(two, "ps -o args")
    newer.kill()
    newer.start()
    assert newer.sh(one, "id -u") == "0\n"
    assert newer.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_READY
    newer.remove_pods()
    assert newer.settled() == []


def test_a_user_opens_its_streams_and_root_changes_the_pods_files(newer: Node) -> None:
    """As servers do whose logs are links to /dev/stdout and /dev/stderr."""
    again = "echo out >/dev/stdout && echo err >/dev/stderr && cat /dev/stdin && echo done"
    pod, root = run(newer, "streams", userns())
    user = secured(run_as_user=cri.Int64Value(value=1000))
    one = newer.run(pod, "user", ["sh", "-c", f"{again} && sleep 1000"], **user)
    eventually(lambda: sorted(newer.log(one).split()) == ["done", "err", "out"])
    for container in (one, root):
        assert newer.sh(container, again) == "out\ndone\n"
    files = "/etc/hosts /etc/hostname /etc/resolv.conf"
    assert newer.sh(root, f"for file in {files}; do echo '# by root' >>$file && stat -c %u $file; done") == "0\n0\n0\n"
    newer.remove_pods()
    assert newer.settled() == []


def test_devices_volumes_and_images_within(newer: Node, tmp_path: Path) -> None:
    name, archive = "localhost/with-volumes:1", str(tmp_path / "image.tar")
    write_archive(busybox_image(config={"Volumes": {"/not-in-the-image": {}}}), archive, name)
    import_image(newer, archive)
    mapped = [cri.IDMapping(container_id=0, host_id=BASE, length=65536)]
    image = cri.Mount(container_path="/image", image=cri.ImageSpec(image=name), readonly=True)
    also_mapped = cri.Mount(uidMappings=mapped, gidMappings=mapped)
    also_mapped.MergeFrom(image)
    also_mapped.container_path = "/also"
    # The device has another path in the container, and nothing of its container path is on the node.
    device = cri.Device(container_path="/dev/of-a-plugin", host_path="/dev/null", permissions="rw")
    _, container = run(newer, "within", userns(), image=name, mounts=[image, also_mapped], devices=[device])
    assert newer.sh(container, "stat -c %u /not-in-the-image; touch /not-in-the-image/file && echo made") == "0\nmade\n"
    assert newer.sh(container, "stat -c %u /image/bin /also/bin") == "0\n0\n"
    assert newer.sh(container, "echo x >/dev/of-a-plugin && test -c /dev/of-a-plugin && echo device") == "device\n"
    newer.remove_pods()
    assert newer.settled() == []


@pytest.mark.parametrize(
    ("security", "words"),
    [
        ({"run_as_user": cri.Int64Value(value=70000)}, "user ID 70000"),
        ({"supplemental_groups": [70001]}, "group ID 70001"),
    ],
)
def test_a_user_that_the_namespace_does_not_have(newer: Node, security: dict[str, Any], words: str) -> None:
    pod = newer.run_pod("unmapped", handler="newer", linux=userns())
    with refused(grpc.StatusCode.FAILED_PRECONDITION, words, "which has the IDs 0 to 65535", "hostUsers"):
        newer.create(pod, "c", ["true"], **secured(**security))
    newer.remove_pods()
    assert newer.settled() == []


def test_features_by_handler(newer: Node) -> None:
    features = {h.name: h.features.user_namespaces for h in newer.client.Status().runtime_handlers}
    assert features == {"": False, "runc": False, "newer": True}
