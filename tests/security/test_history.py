"""Faults that other runtimes have had, tried on this one. docs/security.md has the whole list."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image, serving
from tests.support.imagebuilder import Dir, Layer, Link, busybox_image, write_archive
from tests.support.node import RUNTIME, Node, processes, refused
from tests.support.pods import sandbox, secured
from tests.support.streaming_client import Spdy, WebSocket
from tests.support.waiting import eventually

SLEEP = ["sleep", "1000"]
SECRET = "a secret of the node"


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


@pytest.fixture
def canary(node: Node) -> Iterator[str]:
    """A directory of the node's, which nobody may look into or change."""
    directory = f"{node.base}/canary"
    os.mkdir(directory)
    Path(directory, "secret").write_text(SECRET)
    Path(directory, "ptmx").write_text("the node's own")
    before = tree(directory)
    try:
        yield directory
        assert tree(directory) == before
    finally:
        shutil.rmtree(directory)


def tree(directory: str) -> list[tuple[object, ...]]:
    """Every file below a directory, with all that tells a change."""
    found: list[tuple[object, ...]] = []
    for path, directories, names in os.walk(directory):
        for name in (".", *directories, *names):
            status = os.lstat(f"{path}/{name}")
            found.append((path, name, status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def image(node: Node, tmp_path: Path, layer: Layer, **config: object) -> str:
    """An image of busybox with a layer of an attacker's on it, by name."""
    write_archive(busybox_image(layers=[layer], config=config), str(tmp_path / "i.tar"), "localhost/hostile:1")
    import_image(node, str(tmp_path / "i.tar"))
    return "localhost/hostile:1"


def spec_of(node: Node, container: str) -> dict[str, Any]:
    return json.loads(Path(node.state, "containers", container, "config.json").read_text())


def outcome(node: Node, pod: str, name: str, command: list[str], **fields: object) -> str:
    """What a container that may be refused at any step has printed; "" where it never ran."""
    try:
        container = node.create(pod, name, command, **fields)
        node.client.StartContainer(container_id=container)
    except grpc.RpcError as e:
        assert e.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT), e.details()
        return ""
    node.wait(container)
    return node.log(container)


# Who a container runs as


@pytest.mark.parametrize("user", [0, 1000])
def test_no_capability_is_inheritable(node: Node, pod: str, user: int) -> None:
    """CVE-2022-24769, CVE-2022-27649, CVE-2022-27650, CVE-2022-27651, CVE-2022-27652, CVE-2022-29162."""
    security = secured(
        capabilities=cri.Capability(add_capabilities=["NET_ADMIN"]), run_as_user=cri.Int64Value(value=user)
    )
    container = node.run(pod, "c", SLEEP, **security)
    for process in ("1", "self"):  # the container's own, and an exec's
        masks = node.sh(container, f"grep -E 'CapInh|CapAmb' /proc/{process}/status").split()[1::2]
        assert [int(mask, 16) for mask in masks] == [0, 0]


@pytest.mark.parametrize("privileged", [False, True])
def test_a_user_has_no_capability_that_nobody_asked_for(node: Node, privileged: bool) -> None:
    """CVE-2016-8867, CVE-2018-1000400, CVE-2018-10856, CVE-2021-20188: a user had what root would have had."""
    pod = node.run_pod("pod", linux=sandbox(privileged=privileged))
    container = node.run(pod, "c", SLEEP, **secured(run_as_user=cri.Int64Value(value=1000), privileged=privileged))
    for process in ("1", "self"):
        masks = node.sh(container, f"grep -E 'CapEff|CapPrm|CapAmb' /proc/{process}/status").split()[1::2]
        assert [int(mask, 16) for mask in masks] == [0, 0, 0]


@pytest.mark.parametrize("policy", [cri.Merge, cri.Strict])
def test_the_primary_group_is_among_the_supplementary_ones(node: Node, pod: str, policy: int) -> None:
    """CVE-2022-2989, CVE-2022-2990, CVE-2022-2995, CVE-2022-36109, CVE-2023-25173.

    Who may not be in a group by a file's negative permissions could leave it by setgroups(2).
    """
    container = node.run(
        pod,
        "c",
        SLEEP,
        **secured(
            run_as_user=cri.Int64Value(value=1000),
            run_as_group=cri.Int64Value(value=2000),
            supplemental_groups=[3000],
            supplemental_groups_policy=policy,
        ),
    )
    for process in ("1", "self"):
        assert node.sh(container, f"grep Groups /proc/{process}/status").split()[1:] == ["2000", "3000"]
    assert list(node.status(container).user.linux.supplemental_groups) == [2000, 3000]


def test_a_home_of_two_lines_makes_no_account(node: Node, pod: str) -> None:
    """CVE-2022-4318: HOME was written into the container's /etc/passwd, for a user that the image does not have."""
    home = cri.KeyValue(key="HOME", value=b"/\nroot2::0:0::/:/bin/sh\n")
    container = node.run(pod, "c", SLEEP, envs=[home], **secured(run_as_user=cri.Int64Value(value=4242)))
    passwd = node.sh(container, "cat /etc/passwd")
    assert passwd.startswith("root:x:0:0:")
    assert "root2" not in passwd
    assert "4242" not in passwd


def test_a_seccomp_profile_without_a_name_is_refused(node: Node, pod: str) -> None:
    """CVE-2023-2431: a profile of type Localhost with an empty name ran unconfined."""
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "seccomp profile", "absolute path"):
        node.create(pod, "c", SLEEP, **secured(seccomp=profile))


def test_each_container_has_its_own_environment(node: Node, pod: str) -> None:
    """CVE-2020-14370, CVE-2021-21334: containers that were made at once, or after one another, shared variables."""

    def run(number: int) -> str:
        env = cri.KeyValue(key=f"SECRET{number}", value=b"%d" % number)
        return node.run(pod, f"c{number}", SLEEP, envs=[env])

    with ThreadPoolExecutor(8) as pool:
        containers = list(pool.map(run, range(8)))
    for number, container in enumerate(containers):
        assert node.sh(container, "env | grep SECRET") == f"SECRET{number}={number}\n"


# What an image says


def test_a_volume_of_an_image_stays_in_the_image(node: Node, pod: str, canary: str, tmp_path: Path) -> None:
    """CVE-2022-23648: the paths of an image's volumes led to the node's files, which were copied into them."""
    up = "/.." * 12
    volumes: dict[str, object] = {f"{up}{canary}": {}, "/way": {}, "/deep/way": {}, f"/tmp{up}{canary}/": {}}
    layer: Layer = {"way": Link(canary), "deep": Dir(), "deep/way": Link(f"..{up}{canary}")}
    name = image(node, tmp_path, layer, Volumes=volumes)
    script = f"cat {canary}/* /way/* /deep/way/*; find / -xdev -name secret; echo done"
    printed = outcome(node, pod, "c", ["sh", "-c", script], image=name)
    assert SECRET not in printed
    assert "secret" not in printed.replace("done", "")
    volumes_of_all = Path(node.root, "volumes")
    assert list(volumes_of_all.rglob("secret")) == []


@pytest.mark.parametrize("place", ["dev", "etc", "proc", "sys", "run", "root"])
@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_link_in_an_image_leads_nobody_out_of_it(
    node: Node, pod: str, canary: str, tmp_path: Path, place: str, how: str
) -> None:
    """CVE-2019-18837, CVE-2019-19921, CVE-2023-27561, CVE-2023-28642, CVE-2024-5154, CVE-2026-41579, CVE-2026-47766,
    CVE-2026-55686.

    What is mounted or made for a container at a path of the image must not come to lie on the node.
    """
    target = canary if how == "absolute" else f"{'../' * 12}{canary[1:]}"
    name = image(node, tmp_path, {place: Link(target)}, WorkingDir=f"/{place}/made/up")
    volume = tmp_path / "volume"
    volume.mkdir()
    mounts = [cri.Mount(container_path=f"/{place}/secret", host_path=str(volume))] if place == "root" else []
    printed = outcome(
        node,
        pod,
        "c",
        ["sh", "-c", f"cat /{place}/secret; cat {canary}/secret; touch /{place}/new"],
        image=name,
        mounts=mounts,
    )
    assert SECRET not in printed


def test_labels_of_an_image_and_annotations_of_a_pod_say_nothing_to_the_runtime(node: Node, tmp_path: Path) -> None:
    """CVE-2023-6476, CVE-2024-3154, CVE-2026-53488: they were taken for instructions."""
    words = {
        "org.systemd.property.CPUWeight": "'1'",
        "run.oci.hooks.stdout": f"{node.base}/written",
        "io.kubernetes.cri-o.userns-mode": "auto",
        "containerd.io/restart.loguri": "binary:///bin/sh",
        "cdi.k8s.io/x": "vendor.com/class=device",
    }
    name = image(node, tmp_path, {}, Labels=words)
    pod = node.run_pod("pod", annotations=words)
    container = node.run(pod, "c", SLEEP, image=name)
    annotations = spec_of(node, container)["annotations"]
    assert not annotations.keys() & words.keys()
    assert all(key.startswith("io.kubernetes.cri.") for key in annotations)
    assert dict(node.status(container).labels) == {}
    assert not os.path.exists(f"{node.base}/written")


def test_no_container_is_made_of_a_checkpoint(node: Node, pod: str, tmp_path: Path) -> None:
    """CVE-2024-8676, CVE-2026-50195, CVE-2026-53489, CVE-2026-53492: what an archive says became the container."""
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(bytes(10240))
    with refused(grpc.StatusCode.NOT_FOUND, str(archive), "not on this node"):
        node.create(pod, "c", SLEEP, image=str(archive))


# Sysctls


@pytest.mark.parametrize("separator", ["+", " +", "\n", " \n", "\0"])
def test_a_sysctl_is_one_sysctl(node: Node, separator: str) -> None:
    """CVE-2022-0811: more of them behind a "+" in a value were set on the node.

    The kernel may take a value's first word for all of it.
    """
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    config = node.pod("bad")
    config.linux.sysctls["kernel.shm_rmid_forced"] = f"1{separator}kernel.core_pattern=|/x"
    try:
        node.client.RunPodSandbox(config=config)
    except grpc.RpcError as e:
        assert e.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert node.settled() == []
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER), "net.ipv4.ip_unprivileged_port_start"),
        (cri.NamespaceOption(ipc=cri.NODE, pid=cri.CONTAINER), "kernel.shm_rmid_forced"),
    ],
)
def test_a_sysctl_of_a_namespace_that_is_the_nodes(node: Node, options: cri.NamespaceOption, name: str) -> None:
    """CVE-2022-0532, GHSA-w2j5-3rcx-vx7x: a pod on the node's namespaces set the node's own."""
    path = Path("/proc/sys", name.replace(".", "/"))
    before = path.read_text()
    config = node.pod("bad", linux=sandbox(namespace_options=options))
    config.linux.sysctls[name] = str(int(before) + 1)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, name, "a namespace that the pod has for itself"):
        node.client.RunPodSandbox(config=config)
    assert path.read_text() == before


# Plugins


@pytest.mark.parametrize("kind", ["../plugin", "./plugin", "bin/../../plugin"])
def test_a_plugin_comes_from_the_directories_of_plugins(node: Node, kind: str) -> None:
    """CVE-2021-20206: a plugin's type was a path, and could name any program of the node."""
    plugin = Path(node.base, "plugin")
    plugin.write_text(f"#!/bin/sh\ntouch {node.base}/ran\nexit 1\n")
    plugin.chmod(0o755)
    os.makedirs(f"{node.base}/bin", exist_ok=True)
    first = Path(node.cni, "05-first.conflist")
    first.write_text(json.dumps({"cniVersion": "1.0.0", "name": "first", "plugins": [{"type": kind}]}))
    try:
        node.run_pod("pod")  # by the next file, which is valid
    finally:
        first.unlink()
        plugin.unlink()
    assert not os.path.exists(f"{node.base}/ran")


# Sockets and descriptors


def test_no_socket_can_be_reached_from_the_nodes_network(node: Node) -> None:
    """CVE-2020-15257: a shim's abstract socket, which belongs to the network, took orders from containers in it."""
    options = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
    pod = node.run_pod("pod", linux=sandbox(namespace_options=options))
    container = node.run(pod, "c", SLEEP, stdin=True, tty=True)
    seen = node.sh(container, "cat /proc/net/unix").splitlines()[1:]
    assert node.process is not None
    ours = {node.process.pid, *(pid for pid, words in processes() if node.base in words)}
    assert len(ours) > 1
    inodes = {found for pid in ours for found in sockets_of(pid)}
    known = {line.split()[6]: line.split()[7:] for line in seen}
    paths = [path for inode in inodes & known.keys() for path in known[inode]]
    assert any(path.endswith("cri.sock") for path in paths)
    assert [path for path in paths if path.startswith("@")] == []
    for path in Path(node.base).rglob("*.sock"):
        status = path.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode) & 0o077) == (0, 0), path


def sockets_of(pid: int) -> Iterator[str]:
    """The inodes of a process's sockets."""
    for path in glob.glob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            target = os.readlink(path)
            if target.startswith("socket:["):
                yield target[8:-1]


def test_a_container_inherits_no_descriptor(node: Node, pod: str) -> None:
    """CVE-2016-9962, CVE-2024-21626: one of the node's was open in the container's process, or in an exec's."""
    list_them = "for fd in /proc/self/fd/*; do echo ${fd##*/}; done"
    container = node.run(pod, "c", ["sh", "-c", f"{list_them}; sleep 1000"])
    eventually(lambda: node.log(container))
    pid = node.pid(container)
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    assert set(node.sh(container, list_them).split()) <= {"0", "1", "2", "3"}  # 3 is of the directory itself
    terminal = node.run(pod, "t", SLEEP, tty=True, stdin=True)
    # A start is over a moment before the OCI runtime's process has become the container's.
    eventually(lambda: sorted(os.listdir(f"/proc/{node.pid(terminal)}/fd")) == ["0", "1", "2"])


def test_the_oci_runtime_is_given_no_descriptor(nothing_left: None, busybox_archive: str, tmp_path: Path) -> None:
    """CVE-2024-21626: what is open in the runtime can be a container's working directory, before it is closed."""
    runtime = tmp_path / "runtime"
    found = tmp_path / "found"
    runtime.write_text(
        f"#!{sys.executable} -ISB\nimport os, sys\nout = open({str(found)!r}, 'a')\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    if os.path.exists(f'/proc/self/fd/{fd}') and int(fd) != out.fileno():\n"
        "        print(fd, os.readlink(f'/proc/self/fd/{fd}'), sys.argv, file=out)\n"
        f"out.close()\nos.execv({shutil.which(RUNTIME)!r}, ['runc', *sys.argv[1:]])\n"
    )
    runtime.chmod(0o755)
    with serving(busybox_archive, f'[runtimes.runc]\npath = "{runtime}"\n') as node:
        pod = node.run_pod("pod", linux=sandbox(namespace_options=cri.NamespaceOption(pid=cri.POD)))
        for tty in (False, True):
            container = node.run(pod, f"c{tty}", SLEEP, tty=tty, stdin=True)
            assert node.sh(container, "echo fine") == "fine\n"
            if tty:
                url = node.client.Exec(container_id=container, cmd=["true"], tty=True, stdin=True, stdout=True).url
                WebSocket(url).finish()
    given = found.read_text().splitlines()
    assert len(given) > 12
    assert [line for line in given if line.split()[0] not in ("0", "1", "2")] == []


def test_no_descriptor_is_a_working_directory(node: Node, pod: str, canary: str) -> None:
    """CVE-2024-21626: a working directory below /proc/self/fd was one of the node's, left open by the runtime."""
    up = "/".join([".."] * 16)
    for number in range(3, 21):
        script = f"cat {up}{canary}/secret; ls -d {up}{node.root}"
        printed = outcome(node, pod, f"c{number}", ["sh", "-c", script], working_dir=f"/proc/self/fd/{number}")
        assert SECRET not in printed
        assert node.root not in printed.replace(f"{node.root}: No such", "")


# Paths that are hidden


def test_an_image_does_not_say_what_hides_a_path(node: Node, pod: str, tmp_path: Path) -> None:
    """CVE-2025-31133: a path was hidden below /dev/null of the container, which was a link of an attacker's."""
    layer: Layer = {"dev": Dir(), "dev/null": Link("/shown"), "shown": b"shown after all"}
    name = image(node, tmp_path, layer)
    container = node.run(pod, "c", SLEEP, image=name, **secured(masked_paths=["/etc/group", "/proc/timer_list"]))
    assert node.sh(container, "cat /etc/group /proc/timer_list; test -c /dev/null && echo device") == "device\n"


def test_a_volume_of_an_image_does_not_say_what_hides_a_path(node: Node, pod: str, tmp_path: Path) -> None:
    """CVE-2025-31133, by a volume in the place of /dev."""
    layer: Layer = {"dev": Dir(), "dev/null": Link("/shown"), "shown": b"shown after all"}
    name = image(node, tmp_path, layer, Volumes={"/dev": {}})
    printed = outcome(node, pod, "c", ["cat", "/etc/group"], image=name, **secured(masked_paths=["/etc/group"]))
    assert printed == ""


def test_a_mount_of_a_pod_does_not_say_what_hides_a_path(node: Node, pod: str, tmp_path: Path) -> None:
    """CVE-2025-31133, by a directory of the pod's in the place of /dev."""
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "null").symlink_to("/etc/passwd")
    mounts = [cri.Mount(container_path="/dev", host_path=str(dev))]
    printed = outcome(node, pod, "c", ["cat", "/etc/group"], mounts=mounts, **secured(masked_paths=["/etc/group"]))
    assert printed == ""


@pytest.mark.parametrize("volume", ["/proc", "/proc/self", "/proc/self/attr", "/proc/sys", "/proc/kcore"])
def test_a_volume_of_an_image_is_not_in_the_place_of_the_kernels(
    node: Node, pod: str, tmp_path: Path, volume: str
) -> None:
    """CVE-2019-16884: with a volume at /proc, the process wrote its AppArmor profile and label to the image's files."""
    layer: Layer = {f"{volume[1:]}/false": b"the image's", "proc/self/attr/exec": b""}
    name = image(node, tmp_path, layer, Volumes={volume: {}})
    printed = outcome(node, pod, "c", ["sh", "-c", f"ls {volume}; cat /proc/sys/kernel/ostype"], image=name)
    assert "false" not in printed.split()
    assert printed == "" or "Linux" in printed.splitlines()


# What a client leaves behind


def test_clients_that_come_and_go_leave_nothing(node: Node, pod: str) -> None:
    """CVE-2022-23471, CVE-2025-64329: each left something that waits for ever in the daemon."""
    container = node.run(pod, "c", ["sh", "-c", "while true; do echo tick; sleep 0.01; done"])
    terminal = node.run(pod, "t", SLEEP, tty=True, stdin=True)
    shims = [pid for pid, words in processes() if f"in {node.state}/containers/" in words]
    assert len(shims) == 2

    def come_and_go() -> None:
        for wanted in ({"stdout": True}, {"stdout": True, "stderr": True}):
            client = Spdy(node.client.Attach(container_id=container, **wanted).url)
            client.open_command("error", *wanted)
            client.sock.close()
        client = Spdy(node.client.Attach(container_id=terminal, tty=True, stdin=True, stdout=True).url)
        client.open_command("error", "stdin", "stdout", "resize").sock.close()
        url = node.client.Exec(container_id=terminal, cmd=["/no/such"], tty=True, stdin=True, stdout=True).url
        missing = Spdy(url).open_command("error", "stdin", "stdout", "resize")
        missing.finish()
        WebSocket(node.client.Attach(container_id=container, stdout=True).url).sock.close()
        node.client.Attach(container_id=container, stdout=True)  # and nobody comes

    def held() -> list[int]:
        """Streams of the daemon, descriptors and threads of the shims."""
        return [node.streams(), *(len(os.listdir(f"/proc/{pid}/{what}")) for pid in shims for what in ("fd", "task"))]

    come_and_go()
    before = held()
    for _ in range(10):
        come_and_go()
    eventually(lambda: all(now <= then + 1 for now, then in zip(held(), before, strict=True)))
