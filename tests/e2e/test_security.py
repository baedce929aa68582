"""What a container may do, seen in the container and not only in its spec."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node, refused
from tests.support.pods import secured
from tests.support.seccomp_agent import SeccompAgent
from tests.support.waiting import eventually


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def profile(kind: cri.SecurityProfile.ProfileType, path: str = "") -> cri.SecurityProfile:
    return cri.SecurityProfile(profile_type=kind, localhost_ref=path)


def status_of(node: Node, container: str, field: str) -> str:
    """A field of the first process's /proc/PID/status."""
    return node.sh(container, f"grep {field}: /proc/1/status").split(":")[1].strip()


def test_capabilities_added_and_dropped(node: Node, pod: str) -> None:
    capability = cri.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["CHOWN"])
    container = node.run(pod, "c", ["sleep", "1000"], **secured(capabilities=capability))
    effective = int(status_of(node, container, "CapEff"), 16)
    assert effective >> 12 & 1, "NET_ADMIN"
    assert not effective & 1, "CHOWN"
    node.sh(container, "ip link add dummy-x type bridge && ip link delete dummy-x")
    assert "not permitted" in node.sh(container, "touch /f; chown 1:1 /f 2>&1 || true")


def test_all_capabilities_dropped(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"], **secured(capabilities=cri.Capability(drop_capabilities=["ALL"])))
    for field in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(status_of(node, container, field), 16) == 0


def test_ambient_capabilities_reach_a_user(node: Node, pod: str) -> None:
    capability = cri.Capability(add_ambient_capabilities=["NET_BIND_SERVICE"])
    user = cri.Int64Value(value=1000)
    container = node.run(pod, "c", ["sleep", "1000"], **secured(capabilities=capability, run_as_user=user))
    assert int(status_of(node, container, "CapAmb"), 16) == 1 << 10
    assert int(status_of(node, container, "CapEff"), 16) >> 10 & 1


def test_privileged(node: Node) -> None:
    options = cri.NamespaceOption(pid=cri.CONTAINER)
    security = cri.LinuxSandboxSecurityContext(namespace_options=options, privileged=True)
    pod = node.run_pod("privileged", linux=cri.LinuxPodSandboxConfig(security_context=security))
    renamed = cri.Device(host_path="/dev/null", container_path="/dev/nothing")
    container = node.run(pod, "c", ["sleep", "1000"], devices=[renamed], **secured(privileged=True))
    assert node.sh(container, "test -c /dev/nothing && echo x > /dev/nothing && echo renamed") == "renamed\n"
    assert node.sh(container, "mkdir /mnt; mount -t tmpfs x /mnt && echo mounted") == "mounted\n"
    assert node.sh(container, "test -c /dev/kmsg -o -c /dev/fuse && echo devices") == "devices\n"
    assert node.sh(container, "grep ' /sys ' /proc/mounts").split()[3].startswith("rw")
    plain = node.run(pod, "plain", ["sleep", "1000"])
    assert "denied" in node.sh(plain, "mkdir -p /mnt; mount -t tmpfs x /mnt 2>&1 || true")
    assert node.sh(plain, "grep ' /sys ' /proc/mounts").split()[3].startswith("ro")


def test_a_privileged_container_in_a_pod_that_is_not(node: Node, pod: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "container c is privileged", "pod sandbox is not"):
        node.create(pod, "c", ["true"], **secured(privileged=True))


def test_a_pod_that_becomes_privileged_for_the_debugger(node: Node, pod: str) -> None:
    """`kubectl debug --profile=sysadmin`: the kubelet describes the pod as privileged from then on."""
    described = node.pod("pod")
    described.linux.security_context.privileged = True
    node.described[pod] = described
    debugger = node.run(pod, "debugger", ["sleep", "1000"], **secured(privileged=True))
    assert node.sh(debugger, "mkdir /mnt; mount -t tmpfs x /mnt && echo mounted") == "mounted\n"
    plain = node.run(pod, "plain", ["sleep", "1000"])
    assert "denied" in node.sh(plain, "mkdir -p /mnt; mount -t tmpfs x /mnt 2>&1 || true")


def test_masked_and_read_only_paths(node: Node, pod: str) -> None:
    container = node.run(
        pod, "c", ["sleep", "1000"], **secured(masked_paths=["/proc/meminfo"], readonly_paths=["/proc/sys"])
    )
    assert node.sh(container, "cat /proc/meminfo") == ""
    assert "Read-only" in node.sh(container, "(echo 1 > /proc/sys/net/ipv4/ip_forward) 2>&1 || true")


def test_no_new_privileges(node: Node, pod: str) -> None:
    assert [
        status_of(node, node.run(pod, f"c{flag}", ["sleep", "1000"], **secured(no_new_privs=flag)), "NoNewPrivs")
        for flag in (False, True)
    ] == ["0", "1"]


def test_groups_by_both_policies_and_the_user_in_the_status(node: Node, pod: str) -> None:
    for policy, expected in ((cri.Merge, "0 1234"), (cri.Strict, "0 1234")):
        container = node.run(
            pod,
            f"c{policy}",
            ["sleep", "1000"],
            **secured(supplemental_groups=[1234], supplemental_groups_policy=policy),
        )
        assert node.sh(container, "id -G").strip() == expected
        user = node.status(container).user.linux
        assert (user.uid, user.gid, list(user.supplemental_groups)) == (0, 0, [0, 1234])


def test_seccomp_unconfined_default_and_of_the_node(node: Node, pod: str, tmp_path: Path) -> None:
    (tmp_path / "no-mkdir.json").write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}],
            }
        )
    )
    admin = cri.Capability(add_capabilities=["SYS_ADMIN"])
    kinds = cri.SecurityProfile
    unconfined = node.run(pod, "u", ["sleep", "1000"], **secured(seccomp=profile(kinds.Unconfined)))
    assert status_of(node, unconfined, "Seccomp") == "0"
    default = node.run(pod, "d", ["sleep", "1000"], **secured(seccomp=profile(kinds.RuntimeDefault)))
    assert status_of(node, default, "Seccomp") == "2"
    assert "not permitted" in node.sh(default, "unshare -U true 2>&1 || true")
    assert node.sh(default, "mkdir /x && ls -d /x") == "/x\n"
    lifted = {"seccomp": profile(kinds.RuntimeDefault), "apparmor": profile(kinds.Unconfined), "capabilities": admin}
    unbound = node.run(pod, "l", ["sleep", "1000"], **secured(**lifted))
    assert node.sh(unbound, "unshare -m true && echo allowed") == "allowed\n"
    own = profile(kinds.Localhost, str(tmp_path / "no-mkdir.json"))
    local = node.run(pod, "n", ["sleep", "1000"], **secured(seccomp=own))
    assert "Permission denied" in node.sh(local, "mkdir /x 2>&1 || true")
    old = node.run(pod, "o", ["sleep", "1000"], **secured(seccomp_profile_path="runtime/default"))
    assert status_of(node, old, "Seccomp") == "2"


def test_a_program_of_the_node_answers_system_calls(node: Node, pod: str, tmp_path: Path) -> None:
    """A profile with SCMP_ACT_NOTIFY: the OCI runtime gives the program at listenerPath what it answers by."""
    path = str(tmp_path / "agent.sock")
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}
    document = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "syscalls": [rule]}
    (tmp_path / "asks.json").write_text(json.dumps({**document, "listenerMetadata": "of the test"}))
    asks = secured(seccomp=profile(cri.SecurityProfile.Localhost, str(tmp_path / "asks.json")))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, path):
        node.run(pod, "early", ["sleep", "1000"], **asks)
    agent = SeccompAgent(path, errno.EDQUOT)
    with agent.serving():
        container = node.run(pod, "c", ["sh", "-c", "mkdir /x; exec sleep 1000"], **asks)
        eventually(lambda: "quota exceeded" in node.log(container))
        assert "quota exceeded" in node.sh(container, "mkdir /y 2>&1; true")
        node.client.StopContainer(container_id=container, timeout=0)
    assert [state["metadata"] for state in agent.states] == ["of the test"] * 2
    assert {state["state"]["id"] for state in agent.states} == {container}


def test_a_device_of_the_kubelets_and_one_of_a_vendors(node: Node, pod: str, tmp_path: Path) -> None:
    document = {
        "cdiVersion": "0.8.0",
        "kind": "example.com/thing",
        "devices": [
            {
                "name": "one",
                "containerEdits": {
                    "deviceNodes": [{"path": "/dev/thing", "hostPath": "/dev/fuse"}],
                    "env": ["THING=one"],
                    "mounts": [{"hostPath": str(tmp_path), "containerPath": "/thing", "options": ["ro", "bind"]}],
                },
            }
        ],
    }
    Path(f"{node.base}/cdi/example.json").write_text(json.dumps(document))
    (tmp_path / "file").write_text("of the vendor")
    try:
        container = node.run(
            pod,
            "c",
            ["sleep", "1000"],
            devices=[cri.Device(container_path="/dev/mine", host_path="/dev/fuse", permissions="rw")],
            CDI_devices=[cri.CDIDevice(name="example.com/thing=one")],
        )
        assert node.sh(container, "test -c /dev/mine && test -c /dev/thing && echo both") == "both\n"
        assert node.sh(container, "cat /thing/file; echo $THING") == "of the vendorone\n"
        node.sh(container, "exec 3<>/dev/thing")
    finally:
        Path(f"{node.base}/cdi/example.json").unlink()
