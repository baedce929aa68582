"""The Debian package on a node with systemd: what it installs, and pods on it."""

from __future__ import annotations

import json
import os
import stat

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.node.installed import KUBEPODS, InstalledNode, command, journal, shown


def mode(path: str) -> str:
    return f"{stat.S_IMODE(os.stat(path).st_mode):o}"


def test_the_service_runs_and_is_enabled(node: InstalledNode) -> None:
    assert shown("ActiveState") == "active"
    assert shown("UnitFileState") == "enabled"
    assert shown("Type") == "notify"
    version = command("criserver", "--version").split()[1]
    assert node.client.Version().runtime_version == version


def test_sockets_and_directories_are_roots_own(node: InstalledNode) -> None:
    assert mode("/run/criserver/criserver.sock") == "600"
    for directory in ("/run/criserver", "/var/lib/criserver"):
        assert mode(directory) == "700", directory
        assert os.stat(directory).st_uid == 0


def test_check_finds_nothing_that_hinders_pods(node: InstalledNode) -> None:
    print(command("criserver", "check"))


def test_a_pod_has_an_address_a_log_and_takes_commands(node: InstalledNode) -> None:
    pod = node.run_pod("first")
    container = node.run(pod, "c", ["sh", "-c", "echo hello; echo oh >&2; exec sleep 1000"])
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip
    assert node.sh(container, "cat /etc/hostname") == "first\n"
    session = node.exec(container, "sh", "-c", "read line; echo got $line")
    session.send("stdin", b"it\n")
    assert session.until("stdout", b"\n") == b"got it\n"
    assert session.finish()["status"] == "Success"
    assert sorted(node.log(container).splitlines()) == ["hello", "oh"]
    node.client.StopContainer(container_id=container, timeout=0)
    assert node.status(container).exit_code == 137
    node.remove_pods()
    with pytest.raises(grpc.RpcError):
        node.status(container)


def test_what_a_kubelet_asks_for_is_what_systemd_knows(node: InstalledNode) -> None:
    """The kubelet makes the pod's slice; ours is a scope in it, whose limits systemd and the kernel agree on."""
    parent = f"/{KUBEPODS}/kubepods-besteffort-podabc.slice"
    linux = cri.LinuxPodSandboxConfig(cgroup_parent=parent)
    pod = node.run_pod("sliced", linux=linux)
    limits = cri.LinuxContainerResources(
        memory_limit_in_bytes=64 << 20, cpu_quota=50000, cpu_period=100000, cpu_shares=512
    )
    container = node.run(pod, "c", ["sleep", "1000"], linux=cri.LinuxContainerConfig(resources=limits))
    scope = f"criserver-{container}.scope"
    with open(f"/proc/{node.pid(container)}/cgroup") as f:
        assert f.read() == f"0::{parent}/{scope}\n"
    with open(f"/sys/fs/cgroup{parent}/{scope}/memory.max") as f:
        assert f.read() == f"{64 << 20}\n"
    properties = command("systemctl", "show", scope, "--property=MemoryMax,CPUQuotaPerSecUSec,ActiveState")
    assert sorted(properties.split()) == ["ActiveState=active", "CPUQuotaPerSecUSec=500ms", f"MemoryMax={64 << 20}"]
    # systemd applies its own settings again at a reload; ours must be among them.
    command("systemctl", "daemon-reload")
    assert node.sh(container, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max") == f"{64 << 20}\n50000 100000\n"
    node.client.UpdateContainerResources(
        container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    )
    assert command("systemctl", "show", "--value", "--property=MemoryMax", scope).strip() == str(96 << 20)
    node.remove_pods()
    assert command("systemctl", "list-units", "--all", "--plain", "--no-legend", scope) == ""


def test_the_journal_tells_which_container(node: InstalledNode) -> None:
    pod = node.run_pod("told")
    container = node.run(pod, "c", ["sleep", "1000"])
    command("journalctl", "--sync")
    entries = [json.loads(line) for line in journal("--output=json", f"CRI_CONTAINER={container}").splitlines()]
    assert any(entry["MESSAGE"].startswith("container started") for entry in entries)
    node.remove_pods()
