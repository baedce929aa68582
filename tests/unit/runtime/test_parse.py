"""The kubelet's messages become values of ours, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig, NamespaceMode, Namespaces, PodConfig, Propagation
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import parse
from criserver.runtime.refusals import check_container, check_pod


def pod_config(sent: cri.PodSandboxConfig) -> PodConfig:
    """As the service takes a pod: refused, or read."""
    check_pod(sent)
    return parse.pod_config(sent)


def container_config(sent: cri.ContainerConfig, pod: PodConfig) -> ContainerConfig:
    check_container(sent, pod, cri.PodSandboxConfig())
    return parse.container_config(sent, pod)


UNKNOWN: Any = 9  # a number that no enum of CRI has


def pod(**fields: Any) -> cri.PodSandboxConfig:
    metadata = cri.PodSandboxMetadata(name="p", namespace="n", uid="u", attempt=3)
    return cri.PodSandboxConfig(**{"metadata": metadata, "log_directory": "/var/log/pods/p/", **fields})


def container(**fields: Any) -> cri.ContainerConfig:
    defaults = {"metadata": cri.ContainerMetadata(name="c"), "image": cri.ImageSpec(image="i")}
    return cri.ContainerConfig(**{**defaults, **fields})


def options(**modes: Any) -> cri.LinuxPodSandboxConfig:
    return cri.LinuxPodSandboxConfig(
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(**modes))
    )


POD = pod_config(pod())
IDS = cri.IDMapping(host_id=65536, container_id=0, length=65536)
USERNS = cri.UserNamespace(mode=cri.POD, uids=[IDS], gids=[IDS])
PRIVILEGED = pod_config(
    pod(linux=cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(privileged=True)))
)


def test_a_pods_fields() -> None:
    found = pod_config(
        pod(
            hostname="h",
            dns_config=cri.DNSConfig(servers=["1.1.1.1"], searches=["s"], options=["o"]),
            port_mappings=[cri.PortMapping(protocol=cri.UDP, container_port=1, host_port=2, host_ip="3.3.3.3")],
            labels={"l": "1"},
            annotations={"a": "2"},
            linux=cri.LinuxPodSandboxConfig(cgroup_parent="kubepods/podx/"),
        )
    )
    assert found.full_name == "p_n_u_3"
    assert (found.hostname, found.log_directory, found.cgroup_parent) == ("h", "/var/log/pods/p", "/kubepods/podx")
    assert found.dns.servers == ("1.1.1.1",)
    assert (found.port_mappings[0].protocol, found.port_mappings[0].host_ip) == ("udp", "3.3.3.3")
    assert (found.labels, found.annotations) == ({"l": "1"}, {"a": "2"})
    assert found.namespaces == Namespaces(NamespaceMode.POD, NamespaceMode.POD, NamespaceMode.POD)


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"windows": cri.WindowsPodSandboxConfig()}, InvalidArgumentError, "windows"),
        ({"linux": cri.LinuxPodSandboxConfig(cgroup_parent="/a/../../b")}, InvalidArgumentError, "cgroup_parent"),
        ({"linux": options(network=cri.CONTAINER)}, InvalidArgumentError, "network"),
        ({"linux": options(pid=cri.TARGET, target_id="x")}, InvalidArgumentError, "TARGET"),
        ({"linux": options(pid=cri.TARGET)}, InvalidArgumentError, "target_id"),
        ({"linux": options(ipc=cri.TARGET, target_id="x")}, InvalidArgumentError, "ipc"),
        ({"linux": options(ipc=cri.CONTAINER)}, InvalidArgumentError, "ipc"),
        ({"linux": options(pid=9)}, InvalidArgumentError, "pid = 9"),
        ({"linux": options(userns_options=cri.UserNamespace(mode=UNKNOWN))}, InvalidArgumentError, "mode = 9"),
        ({"port_mappings": [cri.PortMapping(protocol=UNKNOWN)]}, InvalidArgumentError, "protocol = 9"),
        ({"hostname": "a\nb"}, InvalidArgumentError, "hostname"),
        ({"dns_config": cri.DNSConfig(servers=["1.1.1.1\nsearch evil"])}, InvalidArgumentError, "dns_config.servers"),
        ({"dns_config": cri.DNSConfig(servers=["1.1.1.1 2.2.2.2"])}, InvalidArgumentError, "dns_config.servers"),
        ({"dns_config": cri.DNSConfig(searches=["a\nnameserver"])}, InvalidArgumentError, "dns_config.searches"),
        ({"dns_config": cri.DNSConfig(options=["\x0b"])}, InvalidArgumentError, "dns_config.options"),
    ],
)
def test_a_pod_that_is_refused(fields: dict[str, Any], kind: type[InvalidArgumentError], word: str) -> None:
    with pytest.raises(kind, match=word):
        pod_config(pod(**fields))


def test_searches_and_options_are_words_of_a_line() -> None:
    """Kubernetes checks neither names nor values of a pod's DNS options."""
    dns = cri.DNSConfig(searches=["a.b", "", "."], options=["ndots: 5", "rotate\ttimeout:1 ", ""])
    found = pod_config(pod(dns_config=dns)).dns
    assert found.searches == ("a.b", ".")
    assert found.options == ("ndots:", "5", "rotate", "timeout:1")


@pytest.mark.parametrize(
    ("sysctl", "modes", "ok"),
    [
        ("net.core.somaxconn", {}, True),
        ("net/core/somaxconn", {}, True),
        ("kernel.shmmax", {}, True),
        ("fs.mqueue.msg_max", {}, True),
        ("net.ipv4.conf.eth0/100.arp_filter", {}, True),  # of the VLAN interface eth0.100, as kubelets write it
        ("kernel.domainname", {}, True),
        ("kernel.domainname", {"network": cri.NODE}, False),
        ("net.core.somaxconn", {"network": cri.NODE}, False),
        ("kernel.shmmax", {"ipc": cri.NODE}, False),
        ("user.max_net_namespaces", {}, False),
        ("user.max_net_namespaces", {"userns_options": USERNS}, True),
        ("user.max_net_namespaces", {"userns_options": cri.UserNamespace(mode=cri.NODE)}, False),
        ("kernel.panic", {}, False),
        ("net/../vm/swappiness", {}, False),
    ],
)
def test_only_a_namespaced_sysctl_is_taken(sysctl: str, modes: dict[str, int], ok: bool) -> None:
    linux = options(**modes)
    linux.sysctls[sysctl] = "1"
    if ok:
        assert pod_config(pod(linux=linux)).sysctls == {sysctl: "1"}
    else:
        with pytest.raises(InvalidArgumentError, match="sysctl"):
            pod_config(pod(linux=linux))


def test_every_signal_of_cri_has_a_name() -> None:
    assert container_config(container(), POD).stop_signal == ""
    assert container_config(container(stop_signal=cri.SIGRTMINPLUS3), POD).stop_signal == "SIGRTMINPLUS3"


def test_a_containers_log_path_is_the_pods_directory_and_its_own() -> None:
    assert container_config(container(log_path="c/0.log"), POD).log_path == "/var/log/pods/p/c/0.log"
    assert container_config(container(), POD).log_path == ""
    with pytest.raises(InvalidArgumentError, match="log_path"):
        container_config(container(log_path="../q/0.log"), POD)


def test_a_containers_mounts_and_devices() -> None:
    found = container_config(
        container(
            mounts=[
                cri.Mount(container_path="/a/./b", host_path="/h", propagation=cri.PROPAGATION_BIDIRECTIONAL),
                cri.Mount(container_path="/c", host_path="/h", readonly=True),
            ],
            devices=[cri.Device(host_path="/dev/fuse", permissions="r")],
        ),
        POD,
    )
    assert [(m.container_path, m.readonly, m.propagation) for m in found.mounts] == [
        ("/a/b", False, Propagation.BIDIRECTIONAL),
        ("/c", True, Propagation.PRIVATE),
    ]
    assert found.devices[0].container_path == "/dev/fuse"


def linux(**security: Any) -> dict[str, cri.LinuxContainerConfig]:
    return {"linux": cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**security))}


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"metadata": cri.ContainerMetadata()}, InvalidArgumentError, "metadata.name"),
        ({"image": cri.ImageSpec()}, InvalidArgumentError, "image"),
        ({"windows": cri.WindowsContainerConfig()}, InvalidArgumentError, "windows"),
        ({"envs": [cri.KeyValue(key="A=B")]}, InvalidArgumentError, "A=B"),
        ({"envs": [cri.KeyValue(key="A", value=b"\xff")]}, InvalidArgumentError, "UTF-8"),
        ({"mounts": [cri.Mount(container_path="a", host_path="/h")]}, InvalidArgumentError, "container_path"),
        ({"mounts": [cri.Mount(container_path="/a")]}, InvalidArgumentError, "host_path"),
        (
            {"mounts": [cri.Mount(container_path="/a", image=cri.ImageSpec(image="x"))]},
            InvalidArgumentError,
            "readonly",
        ),
        (
            {"mounts": [cri.Mount(container_path="/a", host_path="/h", recursive_read_only=True)]},
            InvalidArgumentError,
            "recursive",
        ),
        ({"devices": [cri.Device(host_path="/dev/x", permissions="rwx")]}, InvalidArgumentError, "rwx"),
        ({"CDI_devices": [cri.CDIDevice(name="no device")]}, InvalidArgumentError, "no device"),
        ({"annotations": {"cdi.k8s.io/x": "neither"}}, InvalidArgumentError, "neither"),
        (linux(run_as_group=cri.Int64Value(value=1)), InvalidArgumentError, "run_as_group"),
        (linux(run_as_user=cri.Int64Value(value=1), run_as_username="x"), InvalidArgumentError, "both"),
        (linux(run_as_user=cri.Int64Value(value=-1)), InvalidArgumentError, "-1"),
        (linux(supplemental_groups=[2**40]), InvalidArgumentError, "supplemental_groups"),
        (linux(seccomp_profile_path="localhost/x"), InvalidArgumentError, "absolute path"),
        (linux(seccomp_profile_path="strange"), InvalidArgumentError, "strange"),
        (
            linux(seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost)),
            InvalidArgumentError,
            "absolute path",
        ),
        (linux(apparmor_profile="strange/x"), InvalidArgumentError, "strange"),
        (
            linux(apparmor=cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost)),
            InvalidArgumentError,
            "AppArmor",
        ),
        (
            linux(namespace_options=cri.NamespaceOption(userns_options=cri.UserNamespace(mode=cri.POD))),
            InvalidArgumentError,
            "0 mappings",
        ),
        (
            {"mounts": [cri.Mount(container_path="/a", host_path="/h", propagation=UNKNOWN)]},
            InvalidArgumentError,
            "propagation = 9",
        ),
        ({"stop_signal": 999}, InvalidArgumentError, "stop_signal = 999"),
        (linux(supplemental_groups_policy=9), InvalidArgumentError, "supplemental_groups_policy = 9"),
        (linux(seccomp=cri.SecurityProfile(profile_type=UNKNOWN)), InvalidArgumentError, "seccomp.profile_type = 9"),
        (linux(apparmor=cri.SecurityProfile(profile_type=UNKNOWN)), InvalidArgumentError, "apparmor.profile_type = 9"),
        (linux(privileged=True), InvalidArgumentError, "pod sandbox is not"),
    ],
)
def test_a_container_that_is_refused(fields: dict[str, Any], kind: type[InvalidArgumentError], word: str) -> None:
    with pytest.raises(kind, match=word):
        container_config(container(**fields), POD)


def test_a_container_takes_its_pods_namespaces_unless_it_names_its_own() -> None:
    alone = pod_config(pod(linux=options(pid=cri.CONTAINER)))
    assert container_config(container(), alone).namespaces.pid is NamespaceMode.CONTAINER
    assert container_config(container(), POD).namespaces.pid is NamespaceMode.POD
    own = container(**linux(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)))
    assert container_config(own, POD).namespaces.pid is NamespaceMode.CONTAINER
    other = container(**linux(namespace_options=cri.NamespaceOption(network=cri.NODE, ipc=cri.NODE, pid=cri.POD)))
    assert container_config(other, POD).namespaces == POD.namespaces, "network and IPC are the pod's"
    shared = container(**linux(namespace_options=cri.NamespaceOption(pid=cri.POD)))
    with pytest.raises(InvalidArgumentError, match="shared PID namespace"):
        container_config(shared, alone)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN+3", 37),
        ("SIGRTMINPLUS3", 37),
        ("RTMAX-1", 63),
        ("x", 15),
        ("1" * 5000, 15),
        ("RTMIN+" + "1" * 5000, 15),
        ("²", 15),
        ("RTMIN+²", 15),
        ("_DFL", 15),
        ("65", 15),
    ],
)
def test_signal_names(name: str, number: int) -> None:
    from criserver.runtime.container_create import signal_number

    assert signal_number(name) == number


def profile(kind: cri.SecurityProfile.ProfileType, path: str = "") -> cri.SecurityProfile:
    return cri.SecurityProfile(profile_type=kind, localhost_ref=path)


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({}, ""),
        ({"seccomp": profile(cri.SecurityProfile.RuntimeDefault)}, "default"),
        ({"seccomp": profile(cri.SecurityProfile.Unconfined)}, ""),
        ({"seccomp": profile(cri.SecurityProfile.Localhost, "/p.json")}, "/p.json"),
        ({"seccomp_profile_path": "unconfined"}, ""),
        ({"seccomp_profile_path": "runtime/default"}, "default"),
        ({"seccomp_profile_path": "localhost//p.json"}, "/p.json"),
        (
            {"seccomp": profile(cri.SecurityProfile.Unconfined), "seccomp_profile_path": "runtime/default"},
            "",
        ),
        ({"seccomp": profile(cri.SecurityProfile.RuntimeDefault), "privileged": True}, ""),
    ],
)
def test_the_seccomp_profile_is_the_new_fields_before_the_old_ones(security: dict[str, Any], expected: str) -> None:
    assert container_config(container(**linux(**security)), PRIVILEGED).security.seccomp == expected


def test_cdi_devices_of_the_field_and_of_annotations() -> None:
    found = container_config(
        container(CDI_devices=[cri.CDIDevice(name="v.com/c=1")], annotations={"cdi.k8s.io/old": "v.com/c=1,v.com/c=2"}),
        POD,
    )
    assert found.cdi_devices == ("v.com/c=1", "v.com/c=2")


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({}, ""),
        (
            {"apparmor": profile(cri.SecurityProfile.RuntimeDefault), "apparmor_profile": "localhost/x"},
            "runtime/default",
        ),
        ({"apparmor": profile(cri.SecurityProfile.Unconfined)}, "unconfined"),
        ({"apparmor": profile(cri.SecurityProfile.Localhost, "own")}, "own"),
        ({"apparmor": profile(cri.SecurityProfile.Localhost, "localhost/own")}, "own"),
        ({"apparmor_profile": "localhost/own"}, "own"),
        ({"apparmor_profile": "unconfined"}, "unconfined"),
        ({"apparmor_profile": "runtime/default"}, "runtime/default"),
        ({"apparmor_profile": "localhost/own", "privileged": True}, "unconfined"),
    ],
)
def test_the_apparmor_profile_is_the_new_fields_before_the_old_ones(security: dict[str, Any], expected: str) -> None:
    assert container_config(container(**linux(**security)), PRIVILEGED).security.apparmor == expected


def test_selinux_options_are_taken_as_they_are() -> None:
    asked = cri.SELinuxOption(type="spc_t", level="s0:c1")
    found = container_config(container(**linux(selinux_options=asked)), POD)
    assert found.security.selinux == ("", "", "spc_t", "s0:c1")
    assert not any(container_config(container(), POD).security.selinux)


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("level", ['s0",x="', "s0 c1", "s0\n"])
def test_a_selinux_label_of_other_letters_is_refused(level: str, privileged: bool) -> None:
    asked = {"selinux_options": cri.SELinuxOption(level=level), "privileged": privileged}
    with pytest.raises(InvalidArgumentError, match="selinux_options"):
        container_config(container(**linux(**asked)), PRIVILEGED)
