"""Fields of CRI that no other test shows: each is seen in the container or in the status, or is refused.

docs/cri-fields.md says for every field which test shows it.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.fixtures import import_image
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import Node, limit_of, refused
from tests.support.pods import limited, sandbox, secured
from tests.support.waiting import eventually

# Everything that a label's or an annotation's value may hold.
ODD = 'two\nlines, "quotes", \u00fc\u20ac, tab\t and nothing:'

ON_CGROUP_V1 = pytest.mark.skipif("memory" not in cgroups.roots(), reason="reads files of cgroup version 1")
WITHOUT_SELINUX = pytest.mark.skipif(os.path.isdir("/sys/fs/selinux"), reason="this node has SELinux")


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def test_metadata_labels_and_annotations_come_back_unchanged(node: Node) -> None:
    tags = {"app.kubernetes.io/name": "x", "odd": ODD, "empty": ""}
    notes = {"note": ODD * 20, "io.kubernetes.pod.name": "not the pod's"}
    pod = node.run_pod("tagged", attempt=3, labels=tags, annotations=notes)
    container = node.run(pod, "c", ["sleep", "1000"], attempt=5, labels=tags, annotations=notes)
    node.kill()
    node.start()
    (pod_item,) = node.client.ListPodSandbox().items
    (container_item,) = node.client.ListContainers().containers
    pod_status = node.client.PodSandboxStatus(pod_sandbox_id=pod).status
    for seen in (pod_item, container_item, pod_status, node.status(container)):
        assert (dict(seen.labels), dict(seen.annotations)) == (tags, notes)
    for seen in (pod_item, pod_status):
        assert seen.metadata == cri.PodSandboxMetadata(name="tagged", namespace="e2e", uid="uid-tagged", attempt=3)
    for seen in (container_item, node.status(container)):
        assert seen.metadata == cri.ContainerMetadata(name="c", attempt=5)


def test_the_log_is_where_log_directory_and_log_path_say(node: Node) -> None:
    pod = node.run_pod("logged")
    assert stat.S_IMODE(os.stat(f"{node.logs}/logged").st_mode) == 0o755
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="deep"),
        image=cri.ImageSpec(image="localhost/busybox:latest"),
        command=["echo", "here"],
        log_path="deep/down/0.log",
    )
    deep = node.client.CreateContainer(pod_sandbox_id=pod, config=config).container_id
    node.client.StartContainer(container_id=deep)
    assert node.wait(deep).log_path == f"{node.logs}/logged/deep/down/0.log"
    assert node.log(deep) == "here\n"


def test_without_a_log_path_nothing_is_kept_and_nothing_blocks(node: Node, pod: str) -> None:
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="silent"),
        image=cri.ImageSpec(image="localhost/busybox:latest"),
        command=["sh", "-c", "seq 1 100000; exit 4"],
    )
    container = node.client.CreateContainer(pod_sandbox_id=pod, config=config).container_id
    node.client.StartContainer(container_id=container)
    ended = node.wait(container)
    assert (ended.exit_code, ended.log_path) == (4, "")
    assert os.listdir(f"{node.logs}/pod") == []


@pytest.mark.parametrize("once", [False, True])
def test_standard_input_is_open_only_where_it_is_asked_for(node: Node, pod: str, once: bool) -> None:
    script = ["sh", "-c", "cat; echo end of input"]
    closed = node.run(pod, "closed", script)
    assert node.wait(closed).exit_code == 0
    assert node.log(closed) == "end of input\n"
    waiting = node.run(pod, "open", script, stdin=True, stdin_once=once)
    time.sleep(0.5)  # without standard input it would have ended
    assert node.status(waiting).state == cri.CONTAINER_RUNNING
    assert node.sh(waiting, "readlink /proc/1/fd/0").startswith("pipe:")
    assert node.log(waiting) == ""


def test_a_terminal_is_the_containers_controlling_one(node: Node, pod: str) -> None:
    container = node.run(pod, "tty", ["sh", "-c", "test -t 0 && test -t 1 && test -t 2; echo $? $TERM; cat"], tty=True)
    eventually(lambda: node.log(container) == "0 xterm\n")
    for number in (0, 1, 2):
        assert node.sh(container, f"readlink /proc/1/fd/{number}") == "/dev/pts/0\n"
    assert node.sh(container, "cut -d' ' -f7 /proc/1/stat").strip() != "0", "no controlling terminal"


def test_environment_variables_are_bytes_as_given_and_win_over_the_images(node: Node, pod: str, tmp_path: Path) -> None:
    image = busybox_image(config={"Env": ["PATH=/bin", "FROM=image", "KEPT=yes"]})
    write_archive(image, str(tmp_path / "i.tar"), "localhost/env:1")
    import_image(node, str(tmp_path / "i.tar"))
    given = {"FROM": "kubelet", "EMPTY": "", "ODD": ODD, "EQUALS": "a=b=c"}
    envs = [cri.KeyValue(key=key, value=value.encode()) for key, value in given.items()]
    twice = [cri.KeyValue(key="FROM", value=b"an earlier one"), *envs]
    container = node.run(pod, "c", ["sleep", "1000"], image="localhost/env:1", envs=twice)
    lines = node.sh(container, "cat /proc/1/environ").rstrip("\0").split("\0")
    assert len(lines) == len({line.partition("=")[0] for line in lines}), "a name came twice"
    seen = dict(line.split("=", 1) for line in lines)
    assert given.items() <= seen.items()
    assert (seen["KEPT"], seen["HOSTNAME"]) == ("yes", "pod")


def test_groups_of_the_image_are_merged_or_not(node: Node, pod: str, tmp_path: Path) -> None:
    accounts = {
        "etc/passwd": b"root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n",
        "etc/group": b"audio:x:29:web\nvideo:x:30:web,other\nweb:x:44:\n",
    }
    write_archive(busybox_image(layers=[accounts]), str(tmp_path / "i.tar"), "localhost/groups:1")
    import_image(node, str(tmp_path / "i.tar"))
    for policy, groups in ((cri.Merge, [29, 30, 44, 1234]), (cri.Strict, [44, 1234])):
        asked = secured(
            run_as_user=cri.Int64Value(value=33), supplemental_groups=[1234], supplemental_groups_policy=policy
        )
        container = node.run(pod, f"c{policy}", ["sleep", "1000"], image="localhost/groups:1", **asked)
        seen = node.sh(container, "grep Groups: /proc/1/status").split()[1:]
        assert sorted(map(int, seen)) == groups
        assert list(node.status(container).user.linux.supplemental_groups) == groups


def test_a_group_of_the_users_and_the_files_it_makes(node: Node, pod: str) -> None:
    user, group = cri.Int64Value(value=1234), cri.Int64Value(value=5678)
    container = node.run(pod, "c", ["sleep", "1000"], **secured(run_as_user=user, run_as_group=group))
    assert node.sh(container, "touch /tmp/mine; stat -c %u:%g /tmp/mine") == "1234:5678\n"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "run_as_group"):
        node.create(pod, "alone", ["true"], **secured(run_as_group=group))


@WITHOUT_SELINUX
@pytest.mark.parametrize("options", [{"type": "container_t"}, {"level": "s0:c1,c2"}, {"user": "u", "role": "r"}])
def test_selinux_options_have_no_effect_without_selinux(node: Node, options: dict[str, str]) -> None:
    """As Kubernetes' conformance suite expects; the log says so once a pod."""
    pod = node.run_pod("options")
    logged = len(node.daemon_log())
    for name in ("c", "d"):
        container = node.run(pod, name, ["sleep", "1000"], **secured(selinux_options=cri.SELinuxOption(**options)))
        info = json.loads(node.client.ContainerStatus(container_id=container, verbose=True).info["info"])
        assert info["ignored"] == {"selinux_options": ", ".join(f"{k} = {v}" for k, v in options.items())}
        assert "selinuxLabel" not in info["runtimeSpec"]["process"]
    assert node.daemon_log()[logged:].count("selinux_options have no effect") == 1


@WITHOUT_SELINUX
def test_what_confines_nothing_and_relabelling_are_taken_without_selinux(node: Node, pod: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen\n")
    before = os.listxattr(tmp_path / "file")
    options = cri.SELinuxOption(type="spc_t", level="s0")
    mount = cri.Mount(container_path="/m", host_path=str(tmp_path), selinux_relabel=True)
    container = node.run(pod, "c", ["sleep", "1000"], mounts=[mount], **secured(selinux_options=options))
    assert node.sh(container, "cat /m/file") == "seen\n"
    assert os.listxattr(tmp_path / "file") == before
    info = json.loads(node.client.ContainerStatus(container_id=container, verbose=True).info["info"])
    assert "selinuxLabel" not in info["runtimeSpec"]["process"], "the runtime would refuse it"


@pytest.fixture
def shared_mount(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of the host whose mounts travel; whatever is mounted below it goes with it."""
    point = tmp_path / "shared"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "fields", str(point)], check=True)
    try:
        subprocess.run(["mount", "--make-shared", str(point)], check=True)
        yield point
    finally:
        subprocess.run(["umount", "-R", str(point)], check=True)


def test_mounts_made_later_travel_as_the_propagation_says(node: Node, shared_mount: Path) -> None:
    pod = node.run_pod("pod", linux=sandbox(privileged=True))
    kinds = {
        "/private": cri.PROPAGATION_PRIVATE,
        "/slave": cri.PROPAGATION_HOST_TO_CONTAINER,
        "/shared": cri.PROPAGATION_BIDIRECTIONAL,
    }
    for name in ("host", "slave", "shared", "private"):
        (shared_mount / name).mkdir()
    mounts = [cri.Mount(container_path=p, host_path=str(shared_mount), propagation=k) for p, k in kinds.items()]
    container = node.run(pod, "c", ["sleep", "1000"], mounts=mounts, **secured(privileged=True))
    subprocess.run(["mount", "-t", "tmpfs", "later", str(shared_mount / "host")], check=True)
    (shared_mount / "host" / "file").touch()
    assert {p: node.sh(container, f"ls {p}/host") for p in kinds} == {
        "/private": "",
        "/slave": "file\n",
        "/shared": "file\n",
    }
    for kind in ("private", "slave", "shared"):
        node.sh(container, f"mount -t tmpfs inside /{kind}/{kind} && touch /{kind}/{kind}/file")
    assert [k for k in ("private", "slave", "shared") if os.listdir(shared_mount / k)] == ["shared"]
    assert node.sh(container, "ls /slave/shared; echo -; ls /private/shared") == "file\n-\n"
    node.client.StopContainer(container_id=container, timeout=0)


@pytest.mark.parametrize("kind", [cri.PROPAGATION_HOST_TO_CONTAINER, cri.PROPAGATION_BIDIRECTIONAL])
def test_propagation_where_the_hosts_mount_is_private(
    node: Node, pod: str, shared_mount: Path, kind: cri.MountPropagation
) -> None:
    subprocess.run(["mount", "--make-private", str(shared_mount)], check=True)
    mount = cri.Mount(container_path="/m", host_path=str(shared_mount / "new"), propagation=kind)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "/m", "propagation", f"--make-rshared {shared_mount}"):
        node.create(pod, "c", ["true"], mounts=[mount])
    assert not (shared_mount / "new").exists()


def test_a_device_keeps_to_its_permissions(node: Node, pod: str) -> None:
    devices = [
        cri.Device(container_path="/dev/reader", host_path="/dev/fuse", permissions="r"),
        cri.Device(host_path="/dev/net/tun"),
    ]
    container = node.run(pod, "c", ["sleep", "1000"], devices=devices)
    node.sh(container, "exec 3</dev/reader")
    assert "not permitted" in node.sh(container, "(exec 3>/dev/reader) 2>&1 || true")
    node.sh(container, "exec 3<>/dev/net/tun")
    for path, words in (("/dev/nothing", "No such file"), ("/etc/passwd", "neither a device node nor a directory")):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, path, words):
            node.create(pod, "none", ["true"], devices=[cri.Device(host_path=path)])


def test_a_device_that_is_a_directory_is_all_nodes_below_it(node: Node, pod: str, tmp_path: Path) -> None:
    things = tmp_path / "things"
    (things / "sub/pts").mkdir(parents=True)
    for name, like in (("fuse", "/dev/fuse"), ("sub/zero", "/dev/zero"), ("sub/pts/0", "/dev/zero")):
        os.mknod(things / name, 0o666 | stat.S_IFCHR, os.stat(like).st_rdev)
    (things / "file").write_text("no device")
    (things / "link").symlink_to("/dev/mem")
    (tmp_path / "alias").symlink_to(things)
    devices = [cri.Device(container_path="/dev/those", host_path=str(tmp_path / "alias"), permissions="r")]
    container = node.run(pod, "c", ["sleep", "1000"], devices=devices)
    assert sorted(node.sh(container, "find /dev/those ! -type d").split()) == ["/dev/those/fuse", "/dev/those/sub/zero"]
    assert node.sh(container, "head -c 3 /dev/those/sub/zero | wc -c").strip() == "3"
    assert "not permitted" in node.sh(container, "(exec 3>/dev/those/fuse) 2>&1 || true")


@ON_CGROUP_V1
def test_memory_nodes_and_swap(node: Node, pod: str) -> None:
    limits = {"cpuset_mems": "0", "memory_limit_in_bytes": 32 << 20, "memory_swap_limit_in_bytes": 48 << 20}
    container = node.run(pod, "c", ["sleep", "1000"], **limited(**limits))
    assert limit_of(pod, container, "cpuset", "cpuset.mems") == "0"
    assert limit_of(pod, container, "memory", "memory.memsw.limit_in_bytes") == str(48 << 20)
    absent = node.create(pod, "absent", ["true"], **limited(cpuset_mems="1023"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "cpuset.mems"):
        node.client.StartContainer(container_id=absent)


@pytest.mark.skipif("hugetlb" not in cgroups.roots(), reason="this node has no hugetlb cgroup of version 1")
def test_huge_pages(node: Node, pod: str) -> None:
    limit = cri.HugepageLimit(page_size="2MB", limit=4 << 20)
    container = node.run(pod, "c", ["sleep", "1000"], **limited(hugepage_limits=[limit]))
    assert limit_of(pod, container, "hugetlb", "hugetlb.2MB.limit_in_bytes") == str(4 << 20)


@pytest.mark.skipif(
    "hugetlb" in cgroups.roots() or "memory" not in cgroups.roots(), reason="this node can limit huge pages"
)
def test_huge_pages_on_a_node_that_cannot_limit_them(node: Node, pod: str) -> None:
    logged = len(node.daemon_log())
    limits = [cri.HugepageLimit(page_size="2MB", limit=4 << 20), cri.HugepageLimit(page_size="1GB", limit=0)]
    for name in ("c", "d"):
        container = node.run(pod, name, ["sleep", "1000"], **limited(hugepage_limits=limits))
        status = node.client.ContainerStatus(container_id=container, verbose=True)
        assert json.loads(status.info["info"])["ignored"] == {"hugepage_limits": f"2MB = {4 << 20}"}
        assert list(status.status.resources.linux.hugepage_limits) == []
    assert node.daemon_log()[logged:].count("hugepage_limits have no effect") == 1


@pytest.mark.skipif("memory" in cgroups.roots(), reason="writes files of cgroup version 2")
def test_files_of_cgroup_version_2_by_name(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], **limited(unified={"memory.high": str(48 << 20)}))
    assert limit_of(pod, container, "", "memory.high") == str(48 << 20)


def test_a_container_alone_among_those_that_share_their_processes(node: Node) -> None:
    pod = node.run_pod("mixed", linux=sandbox(namespace_options=cri.NamespaceOption(pid=cri.POD)))
    node.run(pod, "shared", ["sleep", "1001"])
    own = cri.NamespaceOption(pid=cri.CONTAINER)
    alone = node.run(pod, "alone", ["sleep", "1002"], **secured(namespace_options=own))
    assert "sleep 1001" not in node.sh(alone, "ps -o args")
    assert node.sh(alone, "cat /proc/1/cmdline") == "sleep\x001002\0"


def test_id_mappings_that_do_not_fit(node: Node, pod: str, tmp_path: Path) -> None:
    one = [cri.IDMapping(host_id=100000, container_id=0, length=10)]
    user = cri.UserNamespace(mode=cri.POD, uids=one, gids=one)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "userns_options", "differ"):
        options = cri.NamespaceOption(pid=cri.CONTAINER, userns_options=user)
        node.create(pod, "c", ["true"], **secured(namespace_options=options))
    halves: tuple[dict[str, Any], ...] = ({"uidMappings": one}, {"gidMappings": one})
    for half in halves:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "uidMappings and gidMappings"):
            node.create(pod, "c", ["true"], mounts=[cri.Mount(container_path="/m", host_path=str(tmp_path), **half)])
    if not any(handler.features.user_namespaces for handler in node.client.Status().runtime_handlers):
        mount = cri.Mount(container_path="/m", host_path=str(tmp_path), uidMappings=one, gidMappings=one)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "id-mapped mounts"):
            node.create(pod, "c", ["true"], mounts=[mount])
    assert node.client.ListContainers().containers == []


def test_what_is_asked_of_the_sandboxs_own_process_does_not_reach_the_containers(node: Node) -> None:
    asked = {
        "run_as_user": cri.Int64Value(value=1000),
        "run_as_group": cri.Int64Value(value=1000),
        "supplemental_groups": [1001],
        "supplemental_groups_policy": cri.Strict,
        "readonly_rootfs": True,
        "selinux_options": cri.SELinuxOption(type="t"),
    }
    pod = node.run_pod("own", linux=sandbox(namespace_options=cri.NamespaceOption(pid=cri.POD), **asked))
    container = node.run(pod, "c", ["sleep", "1000"])
    assert node.sh(container, "grep -E '^(Uid|Gid|CapEff):' /proc/1/status | tr -s '\\t ' ' '") == (
        "Uid: 65535 65535 65535 65535\nGid: 65535 65535 65535 65535\nCapEff: 0000000000000000\n"
    )
    assert node.sh(container, "touch /written; stat -c %u:%g /written; id -G") == "0:0\n0\n"


@pytest.mark.parametrize(
    ("security", "word"),
    [
        ({"seccomp": cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="x")}, "seccomp"),
        ({"seccomp_profile_path": "strange"}, "seccomp_profile_path"),
        ({"apparmor": cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost)}, "AppArmor"),
    ],
)
def test_a_sandboxs_profile_that_can_never_be(
    node: Node, security: dict[str, cri.SecurityProfile | str], word: str
) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "pod sandbox", word):
        node.run_pod("bad", linux=sandbox(**security))
    assert node.client.ListPodSandbox().items == []


def test_a_pods_resources_and_overhead_are_shown_as_they_were_given(node: Node) -> None:
    linux = sandbox()
    linux.resources.cpu_shares = 77
    linux.overhead.memory_limit_in_bytes = 1 << 20
    pod = node.run_pod("sized", linux=linux)
    info = json.loads(node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"])
    assert info["resources"] == {"cpu_shares": "77"}
    assert info["overhead"] == {"memory_limit_in_bytes": str(1 << 20)}


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (cri.PortMapping(protocol=cri.UDP, container_port=53, host_port=38053), ["-p udp", "--dport 38053"]),
        (cri.PortMapping(protocol=cri.SCTP, container_port=54, host_port=38054), ["-p sctp", "--dport 38054"]),
        (
            cri.PortMapping(protocol=cri.TCP, container_port=55, host_port=38055, host_ip="127.0.0.2"),
            ["-p tcp", "--dport 38055", "-d 127.0.0.2/32"],
        ),
    ],
)
def test_a_port_by_its_protocol_and_address(node: Node, mapping: cri.PortMapping, words: list[str]) -> None:
    pod = node.run_pod("ports", port_mappings=[mapping])
    address = node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip
    rules = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    (rule,) = [r for r in rules.splitlines() if f"--to-destination {address}:{mapping.container_port}" in r]
    for word in words:
        assert word in rule


def test_a_port_without_a_host_port_is_the_pods_alone(node: Node) -> None:
    pod = node.run_pod("ports", port_mappings=[cri.PortMapping(container_port=80)])
    address = node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip
    rules = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    assert f"--to-destination {address}:" not in rules
