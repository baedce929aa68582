"""What an operator sets for all pods of a node, with one configuration that has all of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image, serving
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import RUNTIME, Node, handler, refused
from tests.support.pods import secured
from tests.support.waiting import eventually

SLEEP = ["sleep", "1000"]
SHM = "io.kubernetes.cri-o.ShmSize"
HOOK = """#!/bin/sh
grep -o '"id":"[0-9a-f]*"' >> "$1"
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the configuration names."""
    base = tmp_path_factory.mktemp("defaults")
    (base / "hooks.d").mkdir()
    (base / "hook").write_text(HOOK)
    (base / "hook").chmod(0o755)
    (base / "shared").write_text("of the node")
    cgroup = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "rw"]}
    spec = {
        "ociVersion": "1.1.0",
        "process": {
            "args": ["sh"],
            "cwd": "/",
            "env": ["BASE=base", "NODE=base"],
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 1024, "hard": 2048}],
        },
        "mounts": [cgroup, {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=4k"]}],
        "linux": {"namespaces": [], "seccomp": {"defaultAction": "SCMP_ACT_KILL"}},
    }
    (base / "base.json").write_text(json.dumps(spec))
    return base


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, base: Path) -> Iterator[Node]:
    with serving(
        busybox_archive,
        'default_ulimits = ["nofile=1000:2000", "core=0"]\n'
        'default_sysctls = ["net.ipv4.ip_forward=1", "kernel.shmmni=1234", "net/ipv4/tcp_syncookies=0"]\n'
        'default_env = ["NODE=node", "PATH=/bin", "OWN=node"]\n'
        f'default_mounts = ["{base}/shared:/etc/shared", "/nowhere:/etc/hidden"]\n'
        f'hooks_dir = ["{base}/none", "{base}/hooks.d"]\nshm_size = 1048576\n'
        "max_container_log_line_size = 300\n"
        "device_ownership_from_security_context = true\nignore_image_defined_volumes = true\n"
        '[images]\npinned = ["localhost/busy*"]\n'
        + handler("runc", RUNTIME)
        + handler("based", RUNTIME)
        + f'base_runtime_spec = "{base}/base.json"\npod_annotations = ["{SHM}"]\n'
        + handler("writable", RUNTIME)
        + "cgroup_writable = true\n",
    ) as node:
        yield node


def run_pod(node: Node, handler: str = "", name: str = "pod", **annotations: str) -> str:
    config = node.pod(name, annotations=annotations)
    pod: str = node.client.RunPodSandbox(config=config, runtime_handler=handler).pod_sandbox_id
    node.pods.add(pod)
    return pod


def hidden() -> list[cri.Mount]:
    """A mount of the pod where default_mounts has one whose file is not there."""
    return [cri.Mount(container_path="/etc/hidden", host_path="/etc")]


def open_files(node: Node, container: str) -> list[str]:
    """The soft and hard limits of a container's first process. A command's soft one is raised by some runcs."""
    (limits,) = (s for s in node.sh(container, "cat /proc/1/limits").split("\n") if s.startswith("Max open files"))
    return limits.split()[3:5]


def test_an_image_is_pinned_while_a_pattern_matches_its_name(node: Node) -> None:
    def pinned() -> bool:
        (image,) = node.client.ListImages(filter={"image": {"image": "localhost/busybox"}}).images
        found: bool = image.pinned
        return found

    assert pinned()
    assert node.client.ImageStatus(image={"image": "localhost/busybox"}).image.pinned
    drop_in = Path(node.config).parent / "conf.d" / "pinned.toml"
    drop_in.parent.mkdir(exist_ok=True)
    for patterns, wanted in (("[]", False), ('["*/busybox:latest"]', True)):
        drop_in.write_text(f"[images]\npinned = {patterns}\n")
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGHUP)
        eventually(partial(lambda expected: pinned() is expected, wanted))
    command = [sys.executable, "-m", "criserver", "image"]
    subprocess.run([*command, "prune", "--all", "--config", node.config], check=True, capture_output=True)
    assert pinned()
    name = "localhost/busybox:latest"
    result = subprocess.run(
        [*command, "unpin", "--config", node.config, name], check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"a pattern of images.pinned matches {name}" in result.stderr


def test_limits_environment_mounts_and_shared_memory(node: Node) -> None:
    pod = run_pod(node)
    container = node.run(pod, "c", SLEEP, envs=[cri.KeyValue(key="OWN", value=b"pod")], mounts=hidden())
    assert open_files(node, container) == ["1000", "2000"]
    seen = node.sh(container, "ulimit -c; echo $NODE $OWN $PATH; cat /etc/shared").split("\n")
    assert seen == ["0", "node pod /bin", "of the node"]
    assert "Read-only" in node.sh(container, "touch /etc/shared 2>&1 || true")
    assert "hosts" in node.sh(container, "ls /etc/hidden")
    assert node.sh(container, "df -k /dev/shm | tail -1 | awk '{print $2}'") == "1024\n"


def test_a_record_of_a_log_has_the_configured_length(node: Node) -> None:
    container = node.run(run_pod(node), "c", ["sh", "-c", "printf '%0700d\\n' 1"], mounts=hidden())
    eventually(lambda: node.status(container).state == cri.CONTAINER_EXITED)
    records = [line.split(" ", 3)[2:] for line in Path(node.status(container).log_path).read_text().splitlines()]
    assert [(tag, len(content)) for tag, content in records] == [("P", 300), ("P", 300), ("F", 100)]


def test_sysctls_are_of_the_pods_that_have_the_namespace_for_themselves(node: Node) -> None:
    read = "cat /proc/sys/net/ipv4/tcp_syncookies /proc/sys/kernel/shmmni"
    linux = node.pod().linux
    linux.sysctls["net.ipv4.tcp_syncookies"] = "2"
    pod = node.run_pod("own", linux=linux)
    assert node.sh(node.run(pod, "c", SLEEP, mounts=hidden()), read) == "2\n1234\n"
    before = Path("/proc/sys/net/ipv4/tcp_syncookies").read_text()
    linux.security_context.namespace_options.network = cri.NODE
    linux.sysctls.clear()
    pod = node.run_pod("shared", linux=linux)
    assert node.sh(node.run(pod, "s", SLEEP, mounts=hidden()), read) == f"{before}1234\n"


def test_a_hook_is_run_for_the_containers_that_its_file_chooses(node: Node, base: Path) -> None:
    pod, file, told = run_pod(node), base / "hooks.d/1.json", base / "told"
    hook = {"path": f"{base}/hook", "args": ["hook", str(told)]}
    when = {"commands": ["sleep$"], "annotations": {"^wants$": "^it"}}
    document = {"version": "1.0.0", "hook": hook, "when": when, "stages": ["createRuntime", "poststop"]}
    file.write_text(json.dumps(document))
    told.write_text("")
    try:
        chosen = node.run(pod, "chosen", SLEEP, annotations={"wants": "it all"}, mounts=hidden())
        node.run(pod, "other", SLEEP, annotations={"wants": "nothing"}, mounts=hidden())
        assert told.read_text() == f'"id":"{chosen}"\n'
        node.client.StopContainer(container_id=chosen, timeout=0)
        eventually(lambda: told.read_text() == f'"id":"{chosen}"\n' * 2)
        file.write_text(json.dumps({**document, "stages": ["never"]}))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, str(file), "key stages.0: 'never'"):
            node.create(pod, "wrong", SLEEP)
    finally:
        file.unlink()


def test_the_base_of_a_handlers_specs(node: Node) -> None:
    pod = run_pod(node, "based", **{SHM: "2Mi"})
    container = node.run(pod, "c", SLEEP, mounts=hidden())
    assert open_files(node, container) == ["1000", "2000"]
    seen = node.sh(container, "ulimit -Sc; ulimit -Hc; echo $BASE $NODE; df -k /scratch /dev/shm")
    assert seen.split("\n")[:3] == ["2", "4", "base base"]
    assert [line.split()[1] for line in seen.split("\n")[4:6]] == ["4", "2048"]
    assert " rw,nosuid" in node.sh(container, "grep ' /sys/fs/cgroup ' /proc/mounts")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, SHM, "much"):
        run_pod(node, "based", "much", **{SHM: "much"})


def test_a_writable_cgroup_needs_version_2(node: Node) -> None:
    pod = run_pod(node, "writable")
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "[runtimes.writable] cgroup_writable needs cgroup version 2"):
            node.create(pod, "c", SLEEP)
        return
    container = node.run(pod, "c", SLEEP, mounts=hidden())
    assert node.sh(container, "mkdir /sys/fs/cgroup/own && rmdir /sys/fs/cgroup/own && echo yes") == "yes\n"


def test_devices_belong_to_the_containers_user(node: Node) -> None:
    devices = [cri.Device(container_path="/dev/given", host_path="/dev/full", permissions="rw")]
    pod = run_pod(node)
    linux = secured(run_as_user=cri.Int64Value(value=1234), run_as_group=cri.Int64Value(value=56))
    container = node.run(pod, "c", SLEEP, devices=devices, mounts=hidden(), **linux)
    assert node.sh(container, "stat -c '%u %g %F' /dev/given").startswith("1234 56 character")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert os.stat("/dev/full").st_uid == 0


def test_volumes_of_images_are_left_out(node: Node, tmp_path: Path) -> None:
    path = str(tmp_path / "volume.tar")
    write_archive(busybox_image(config={"Volumes": {"/data": {}}}), path, "localhost/volume:latest")
    import_image(node, path)
    pod = run_pod(node)
    container = node.run(pod, "c", SLEEP, image="localhost/volume:latest", mounts=hidden())
    assert node.sh(container, "grep -c ' /data ' /proc/mounts || true") == "0\n"
