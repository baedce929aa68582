"""Every refusal of the runtime's calls: its code, its message, and that it leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import host
from tests.support.node import Node, refused

UNKNOWN = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("rpc", "field"),
    [
        ("PodSandboxStatus", "pod_sandbox_id"),
        ("ContainerStatus", "container_id"),
        ("StartContainer", "container_id"),
        ("ReopenContainerLog", "container_id"),
    ],
)
def test_an_unknown_pod_or_container(node: Node, rpc: str, field: str) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN, "does not exist"):
        getattr(node.client, rpc)(**{field: UNKNOWN})


def test_an_unknown_container_in_an_exec(node: Node) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN):
        node.client.ExecSync(container_id=UNKNOWN, cmd=["true"])


def test_an_unknown_pod_for_a_container(node: Node) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN):
        node.create(UNKNOWN, "c", ["true"])


def test_an_empty_id(node: Node) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "empty"):
        node.client.StopPodSandbox(pod_sandbox_id="")


def test_a_duplicate_pod_name(node: Node) -> None:
    pod = node.run_pod("dup")
    with refused(grpc.StatusCode.ALREADY_EXISTS, "dup_e2e_uid-dup_0", pod):
        node.run_pod("dup")
    assert [p.id for p in node.client.ListPodSandbox().items] == [pod]
    node.run_pod("dup", attempt=1)


def test_a_duplicate_container_name(node: Node) -> None:
    pod = node.run_pod()
    container = node.create(pod, "dup", ["true"])
    with refused(grpc.StatusCode.ALREADY_EXISTS, "dup_", container):
        node.create(pod, "dup", ["true"])
    assert [c.id for c in node.client.ListContainers().containers] == [container]


def test_an_image_that_is_not_there(node: Node) -> None:
    pod = node.run_pod()
    with refused(grpc.StatusCode.NOT_FOUND, "localhost/absent:1", "pull it first"):
        node.create(pod, "c", ["true"], image="localhost/absent:1")
    assert node.client.ListContainers().containers == []


def test_a_command_that_does_not_exist(node: Node) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", ["/no/such/command"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "/no/such/command", "no such file"):
        node.client.StartContainer(container_id=container)
    status = node.status(container)
    assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 128, "StartError")
    assert "/no/such/command" in status.message


def test_a_command_that_does_not_exist_in_an_exec(node: Node) -> None:
    pod = node.run_pod()
    container = node.run(pod, "c", ["sleep", "1000"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "nowhere"):
        node.client.ExecSync(container_id=container, cmd=["nowhere"], timeout=30)


@pytest.mark.parametrize("field", ["run_as_username", "image"])
def test_a_user_that_does_not_exist(node: Node, field: str, tmp_path: Path) -> None:
    pod = node.run_pod()
    fields: dict[str, Any] = {}
    if field == "image":
        from tests.support.fixtures import import_image
        from tests.support.imagebuilder import busybox_image, write_archive

        write_archive(busybox_image(config={"User": "stranger"}), str(tmp_path / "i.tar"), "localhost/stranger:1")
        import_image(node, str(tmp_path / "i.tar"))
        fields["image"] = "localhost/stranger:1"
    else:
        security = cri.LinuxContainerSecurityContext(run_as_username="stranger")
        fields["linux"] = cri.LinuxContainerConfig(security_context=security)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "'stranger'", "/etc/passwd"):
        node.create(pod, "c", ["true"], **fields)
    assert node.client.ListContainers().containers == []
    assert os.listdir(f"{node.state}/containers") == []


def test_a_missing_cni_configuration(node: Node) -> None:
    os.rename(f"{node.cni}/10-e2e.conflist", f"{node.base}/aside")
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "CNI", node.cni):
            node.run_pod("lonely")
    finally:
        os.rename(f"{node.base}/aside", f"{node.cni}/10-e2e.conflist")
    assert node.settled() == []


def test_a_missing_cni_plugin(node: Node) -> None:
    with open(f"{node.cni}/05-first.conflist", "w") as f:
        f.write('{"cniVersion": "1.0.0", "name": "first", "plugins": [{"type": "no-such-plugin"}]}')
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "no-such-plugin", "/usr/lib/cni"):
            node.run_pod("lonely")
    finally:
        os.unlink(f"{node.cni}/05-first.conflist")
    assert node.settled() == []


SHARED_PIDS = cri.LinuxPodSandboxConfig(
    security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD))
)


# With a shared PID namespace an infra process is started beside the plugins: they may fail before it runs, or after.
@pytest.mark.parametrize(("linux", "delay"), [(None, 0), (SHARED_PIDS, 0), (SHARED_PIDS, 0.3)])
def test_a_plugin_that_fails_half_way_leaves_nothing(
    node: Node, linux: cri.LinuxPodSandboxConfig | None, delay: float
) -> None:
    os.makedirs(f"{node.base}/bin", exist_ok=True)
    with open(f"{node.base}/bin/broken", "w") as f:
        f.write(
            f'#!/bin/sh\ncat >/dev/null\n[ "$CNI_COMMAND" = ADD ] || exit 0\nsleep {delay}\n'
            'echo \'{"cniVersion":"1.0.0","code":999,"msg":"the cable is cut"}\'\nexit 1\n'
        )
        os.fchmod(f.fileno(), 0o755)
    with open(f"{node.cni}/10-e2e.conflist") as f:
        text = f.read()
    with open(f"{node.cni}/05-first.conflist", "w") as f:
        # Alone, where it is to fail before an infra process can run.
        more = '}, {"type": "broken"}]}'
        f.write(
            text.replace("}]}", more) if delay or linux is None else text[: text.index("[")] + '[{"type": "broken"}]}'
        )
    try:
        with refused(grpc.StatusCode.INTERNAL, "broken", "the cable is cut"):
            node.run_pod("lonely", linux=linux, deadline=10)
    finally:
        os.unlink(f"{node.cni}/05-first.conflist")
    assert node.settled() == []
    assert node.client.ListPodSandbox().items == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": cri.PodSandboxMetadata(name="", namespace="n", uid="u")}, ["metadata.name"]),
        ({"log_directory": "relative"}, ["log_directory", "'relative'"]),
        ({"hostname": "x" * 65}, ["65 characters"]),
        ({"port_mappings": [cri.PortMapping(container_port=70000)]}, ["70000"]),
    ],
)
def test_a_pod_that_can_never_run(node: Node, change: dict[str, Any], words: list[str]) -> None:
    config = node.pod("bad")
    config.MergeFrom(cri.PodSandboxConfig(**change)) if "metadata" not in change else config.metadata.CopyFrom(
        change["metadata"]
    )
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        node.client.RunPodSandbox(config=config)
    assert node.client.ListPodSandbox().items == []


@pytest.mark.parametrize("name", ["kernel.hostname", "vm.swappiness", "net"])
def test_a_sysctl_of_the_node(node: Node, name: str) -> None:
    config = node.pod("bad")
    config.linux.sysctls[name] = "1"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, name):
        node.client.RunPodSandbox(config=config)


def test_an_unknown_runtime_handler(node: Node) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "'kata'", "runc"):
        node.client.RunPodSandbox(config=node.pod("handler"), runtime_handler="kata")


def test_no_command_at_all(node: Node, tmp_path: Path) -> None:
    from tests.support.fixtures import import_image
    from tests.support.imagebuilder import busybox_image, write_archive

    write_archive(busybox_image(config={"Cmd": []}), str(tmp_path / "i.tar"), "localhost/mute:1")
    import_image(node, str(tmp_path / "i.tar"))
    pod = node.run_pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "no command"):
        node.create(pod, "c", image="localhost/mute:1")


def test_an_unknown_capability(node: Node) -> None:
    pod = node.run_pod()
    security = cri.LinuxContainerSecurityContext(capabilities=cri.Capability(add_capabilities=["FLY"]))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "'FLY'"):
        node.create(pod, "c", ["true"], linux=cri.LinuxContainerConfig(security_context=security))
    assert node.client.ListContainers().containers == []


def test_a_log_path_that_leads_out_of_the_pods_directory(node: Node) -> None:
    pod = node.run_pod()
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="c"),
        image=cri.ImageSpec(image="localhost/busybox:latest"),
        command=["true"],
        log_path="../../etc/cron.d/x",
    )
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "log_path", "../../etc/cron.d/x"):
        node.client.CreateContainer(pod_sandbox_id=pod, config=config)


def test_calls_on_a_container_in_the_wrong_state(node: Node) -> None:
    pod = node.run_pod()
    container = node.create(pod, "c", ["sleep", "1000"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "created, not running"):
        node.client.ExecSync(container_id=container, cmd=["true"])
    node.client.StartContainer(container_id=container)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "running, not created"):
        node.client.StartContainer(container_id=container)
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not-ready"):
        node.create(pod, "late", ["true"])


def test_a_seccomp_profile_that_is_not_there(node: Node) -> None:
    pod = node.run_pod()
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/no/profile.json")
    security = cri.LinuxContainerSecurityContext(seccomp=profile)
    with refused(grpc.StatusCode.NOT_FOUND, "/no/profile.json"):
        node.create(pod, "c", ["true"], linux=cri.LinuxContainerConfig(security_context=security))
    assert node.client.ListContainers().containers == []


def test_a_cdi_device_that_is_not_there(node: Node) -> None:
    pod = node.run_pod()
    with refused(grpc.StatusCode.NOT_FOUND, "vendor.com/class=none", f"{node.base}/cdi"):
        node.create(pod, "c", ["true"], CDI_devices=[cri.CDIDevice(name="vendor.com/class=none")])
    assert node.client.ListContainers().containers == []


@pytest.mark.skipif(host.apparmor_profiles() is not None, reason="this node has AppArmor")
@pytest.mark.parametrize("field", ["apparmor", "apparmor_profile"])
def test_an_apparmor_profile_on_a_node_without_apparmor(node: Node, field: str) -> None:
    pod = node.run_pod()
    profile = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="own")
    security = {"apparmor": profile} if field == "apparmor" else {"apparmor_profile": "localhost/own"}
    context = cri.LinuxContainerSecurityContext(**security)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "'own'", "no AppArmor"):
        node.create(pod, "c", ["true"], linux=cri.LinuxContainerConfig(security_context=context))
    assert node.client.ListContainers().containers == []
