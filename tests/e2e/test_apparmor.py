"""AppArmor in real containers: what the default profile denies, and profiles of the node."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import host
from tests.support.node import Node, refused
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(host.apparmor_profiles() is None, reason="this node's kernel has no AppArmor")

OWN = "criserver-e2e-read-only"


def parser(option: str, text: str) -> None:
    subprocess.run(["apparmor_parser", option], input=text, text=True, check=True)


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod()


@pytest.fixture
def own() -> Iterator[str]:
    """A profile of the node's, under which nothing can be written."""
    text = f"profile {OWN} flags=(attach_disconnected) {{\n  file,\n  deny /** w,\n}}\n"
    parser("--replace", text)
    yield OWN
    parser("--remove", text)


def profile(kind: cri.SecurityProfile.ProfileType, name: str = "") -> cri.SecurityProfile:
    return cri.SecurityProfile(profile_type=kind, localhost_ref=name)


def secured(*capabilities: str, **fields: Any) -> cri.LinuxContainerConfig:
    wanted = cri.Capability(add_capabilities=capabilities)
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(capabilities=wanted, **fields))


def label(node: Node, container: str) -> str:
    return node.sh(container, "cat /proc/1/attr/current").strip()


@pytest.mark.parametrize("asked", [None, cri.SecurityProfile.RuntimeDefault], ids=["unset", "RuntimeDefault"])
def test_the_default_profile_keeps_the_nodes_kernel_from_containers(
    node: Node, pod: str, asked: cri.SecurityProfile.ProfileType | None
) -> None:
    """With a capability, and without what is masked or read-only: nothing but the profile is in the way."""
    fields = {} if asked is None else {"apparmor": profile(asked)}
    linux = secured("SYS_ADMIN", "SYSLOG", **fields)
    sysfs = cri.Mount(host_path="/sys", container_path="/sys")
    container = node.run(pod, "c", ["sleep", "1000"], linux=linux, mounts=[sysfs])
    assert label(node, container) == "criserver-default (enforce)"
    for attempt in (
        "mount -t tmpfs none /mnt",
        "echo 1 > /proc/sys/kernel/printk_ratelimit",
        "echo 1 > /proc/sys/vm/overcommit_memory",
        "echo h > /proc/sysrq-trigger",
        "echo 1 > /sys/kernel/profiling",
        "head -c 1 /proc/kcore",
        "ls /sys/firmware",
    ):
        denied = node.sh(container, f"mkdir -p /mnt; ({attempt}) 2>&1 && echo succeeded; true")
        assert "ermission denied" in denied, attempt
        assert "succeeded" not in denied, attempt
    # What programs do in ordinary life goes on.
    node.sh(container, "echo 5 > /proc/self/oom_score_adj; echo x > /tmp-file; kill -CONT 1; ps; cat /proc/1/status")


def test_what_is_started_in_the_container_later_is_confined_too(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"])
    assert node.sh(container, "cat /proc/self/attr/current") == "criserver-default (enforce)\n"


def test_what_has_one_more_profile_may_signal_its_own(node: Node, pod: str) -> None:
    """As with crun and no_new_privs, and as Linux 6.17 does with what is executed in a container."""
    assert label(node, node.run(pod, "c", ["sleep", "1000"])) == "criserver-default (enforce)"  # so it is loaded
    wide = f"profile {OWN}-not flags=(attach_disconnected) {{\n  file,\n  capability,\n  signal,\n  ptrace,\n}}\n"
    parser("--replace", wide)
    try:
        script = "cat /proc/self/attr/current; sleep 1000 & kill -9 $! && wait $!; echo ended by $?"
        enter = f'echo "exec criserver-default//&{OWN}-not" > /proc/self/attr/exec; exec sh -c "$0"'
        done = subprocess.run(["sh", "-c", enter, script], capture_output=True, text=True, check=True)
    finally:
        parser("--remove", wide)
    assert done.stdout.splitlines() == [f"criserver-default//&{OWN}-not (enforce)", "ended by 137"], done.stderr


def test_a_confined_container_is_stopped_by_its_signal(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"])
    eventually(lambda: node.log(container) == "ready\n")
    node.client.StopContainer(container_id=container, timeout=30)
    assert node.status(container).exit_code == 7


def test_unconfined_and_privileged_containers_may_mount(node: Node) -> None:
    privileged = cri.LinuxSandboxSecurityContext(
        privileged=True, namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
    )
    pod = node.run_pod("privileged", linux=cri.LinuxPodSandboxConfig(security_context=privileged))
    free = secured("SYS_ADMIN", apparmor=profile(cri.SecurityProfile.Unconfined))
    whole = secured(privileged=True, apparmor=profile(cri.SecurityProfile.RuntimeDefault))
    for name, linux in (("free", free), ("whole", whole)):
        container = node.run(pod, name, ["sleep", "1000"], linux=linux)
        assert label(node, container).removesuffix(" (unconfined)") == "unconfined"
        node.sh(container, "mkdir -p /mnt; mount -t tmpfs none /mnt")


def test_a_profile_of_the_node(node: Node, pod: str, own: str) -> None:
    container = node.run(
        pod, "c", ["sleep", "1000"], linux=secured(apparmor=profile(cri.SecurityProfile.Localhost, own))
    )
    assert label(node, container) == f"{own} (enforce)"
    assert "ermission denied" in node.sh(container, "(echo x > /file) 2>&1 || true")


def test_a_profile_that_is_not_loaded(node: Node, pod: str) -> None:
    for name in (OWN, f"localhost/{OWN}"):
        linux = secured(apparmor=profile(cri.SecurityProfile.Localhost, name))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, f"'{OWN}'", "not loaded"):
            node.create(pod, "c", ["true"], linux=linux)


def test_the_default_profile_comes_back_when_somebody_has_unloaded_it(node: Node, pod: str) -> None:
    parser("--remove", "profile criserver-default {}\n")
    assert "criserver-default" not in (host.apparmor_profiles() or ())
    assert label(node, node.run(pod, "c", ["sleep", "1000"])) == "criserver-default (enforce)"


def test_the_infra_process_is_confined(node: Node) -> None:
    options = cri.NamespaceOption(pid=cri.POD)
    linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))
    pod = node.run_pod("pids", linux=linux)
    assert label(node, node.run(pod, "c", ["sleep", "1000"])) == "criserver-default (enforce)"
