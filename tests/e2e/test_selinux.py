"""The SELinux labels of containers, their files and their volumes, with a loaded policy, permissive or not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import selinux
from tests.support.node import Node, refused
from tests.support.pods import sandbox, secured

pytestmark = pytest.mark.skipif(not selinux.is_enabled(), reason="this node's kernel has no SELinux policy")

SLEEP = ["sleep", "1000"]


def label(node: Node, container: str) -> str:
    """Of the container's first process, and of a command in it."""
    first, second = (node.sh(container, f"cat /proc/{pid}/attr/current").strip("\0\n") for pid in (1, "self"))
    assert first == second
    return first


def level(node: Node, container: str) -> str:
    found = re.fullmatch(r"system_u:system_r:container_t:(s0:c\d+,c\d+)", label(node, container))
    assert found is not None, label(node, container)
    return found[1]


def labelled(path: str | Path) -> str:
    return os.getxattr(path, "security.selinux").decode().rstrip("\0")


def test_pods_are_told_apart_and_containers_of_one_are_not(node: Node) -> None:
    one, other = node.run_pod("one"), node.run_pod("other")
    first, second, third = node.run(one, "a", SLEEP), node.run(one, "b", SLEEP), node.run(other, "c", SLEEP)
    assert level(node, first) == level(node, second)
    assert level(node, first) != level(node, third)


def test_what_a_container_sees_has_its_pods_level(node: Node) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", SLEEP)
    files = f"system_u:object_r:container_file_t:{level(node, container)}"
    mounted = {line.split(" ")[4]: line for line in node.sh(container, "cat /proc/self/mountinfo").splitlines()}
    for point in ("/", "/dev", "/dev/shm"):
        assert f'context="{files}"' in mounted[point], mounted[point]
    for name in ("hosts", "resolv.conf", "hostname"):
        assert labelled(f"{node.root}/sandboxes/{pod}/{name}") == files


def test_a_volume_is_relabelled_where_that_is_asked_for(node: Node, tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    before = labelled(tmp_path / "other/file")
    mounts = [
        cri.Mount(container_path=f"/{name}", host_path=str(tmp_path / name), selinux_relabel=name == "own")
        for name in ("own", "other")
    ]
    container = node.run(node.run_pod(), "c", SLEEP, mounts=mounts)
    files = f"system_u:object_r:container_file_t:{level(node, container)}"
    assert labelled(tmp_path / "own") == labelled(tmp_path / "own/file") == files
    assert labelled(tmp_path / "other/file") == before


def test_a_privileged_container_is_not_confined(node: Node) -> None:
    pod = node.run_pod(linux=sandbox(privileged=True))
    container = node.run(pod, "c", SLEEP, **secured(privileged=True))
    assert label(node, container) == "system_u:system_r:spc_t:s0"


def test_options_count_before_what_the_pod_has(node: Node) -> None:
    pod = node.run_pod(linux=sandbox(selinux_options=cri.SELinuxOption(level="s0:c7,c8")))
    assert level(node, node.run(pod, "pods", SLEEP)) == "s0:c7,c8"
    asked = cri.SELinuxOption(level="s0:c1,c2")
    assert level(node, node.run(pod, "own", SLEEP, **secured(selinux_options=asked))) == "s0:c1,c2"
    asked = cri.SELinuxOption(type="spc_t")
    container = node.run(pod, "unconfined", SLEEP, **secured(selinux_options=asked))
    assert label(node, container) == "system_u:system_r:spc_t:s0:c7,c8"


@pytest.mark.parametrize("options", [{"type": "no_such_type_t"}, {"level": "s0,c1,c2"}])
def test_a_label_that_the_policy_does_not_know_is_refused(node: Node, options: dict[str, str]) -> None:
    pod = node.run_pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "selinux_options", "does not know the label"):
        node.create(pod, "c", SLEEP, **secured(selinux_options=cri.SELinuxOption(**options)))
    assert node.client.ListContainers().containers == []


def test_a_pods_level_outlives_the_daemon(node: Node) -> None:
    pod = node.run_pod()
    before = level(node, node.run(pod, "before", SLEEP))
    node.kill()
    node.start()
    assert level(node, node.run(pod, "after", SLEEP)) == before


def test_a_pod_with_a_process_of_its_own(node: Node) -> None:
    pod = node.run_pod(linux=sandbox(namespace_options=cri.NamespaceOption(pid=cri.POD)))
    container = node.run(pod, "c", SLEEP)
    found = re.search(r":container_t:(s0:c\d+,c\d+)\0?$", node.sh(container, "cat /proc/self/attr/current"))
    assert found is not None
    assert f":container_file_t:{found[1]}" in node.sh(container, "grep ' /dev ' /proc/1/mountinfo")
