"""``criserver check``: it finds each thing that a node may lack, names it, and says what to do."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criserver.check import ExaminedNode, Finding, Level, able, run
from criserver.config import Config, RuntimeHandler, load

MOUNTS = """\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
22 21 0:20 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
23 21 0:21 / /run rw,nosuid - tmpfs tmpfs rw,mode=755
"""
LEGACY = """\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
23 21 0:21 / /run rw,nosuid - tmpfs tmpfs rw,mode=755
"""
NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {"type": "bridge", "ipMasq": True, "ipam": {"type": "host-local"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


class Fake:
    """A node in a directory, sound until a test changes something of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/mountinfo", MOUNTS)
        self.write("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
        self.write("proc/locks", "")
        for name in ("mnt", "pid", "net", "ipc", "uts", "user"):
            self.write(f"proc/self/ns/{name}", "")
        self.write("proc/sys/kernel/osrelease", "6.1.0\n")
        self.write("proc/sys/kernel/seccomp/actions_avail", "kill allow\n")
        self.write("proc/sys/user/max_user_namespaces", "15000\n")
        self.write("proc/sys/net/ipv4/ip_forward", "1\n")
        self.write("proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")
        self.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n")
        self.write("run/systemd/system/.keep", "")
        self.write("var/lib/.keep", "")
        for program in ("usr/bin/catatonit", "usr/lib/cni/bridge", "usr/lib/cni/portmap", "usr/lib/cni/host-local"):
            self.write(program, "", 0o755)
        self.write("etc/cni/net.d/10-pods.conflist", json.dumps(NETWORK))
        self.host = ExaminedNode(
            root=str(root),
            user=lambda: 0,
            which=lambda name: f"/usr/bin/{name}",
            overlay=lambda _: None,
            idmap=lambda _: None,
            link=lambda _: None,
            iptables=lambda _: None,
            calls=list,
            version=lambda _: "runc version 1.4.3",
            plugin_version=lambda _: "CNI portmap plugin v1.9.0",
            network=lambda _: None,
            features=lambda _: ("id-mapped mounts",),
            container=lambda _config, _name: None,
            synchronised=lambda: True,
        )
        self.config = dataclasses.replace(load(None), cgroup_driver="systemd")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def change(self, **tries: Any) -> None:
        self.host = dataclasses.replace(self.host, **tries)

    def configure(self, **keys: Any) -> None:
        self.config = dataclasses.replace(self.config, **keys)

    def faults(self) -> list[Finding]:
        return [finding for finding in run(self.config, self.host) if finding.level is not Level.OK]

    def fault(self) -> Finding:
        """The only thing that is amiss."""
        found = self.faults()
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def node(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_sound_node_has_no_faults_and_ran_a_container(node: Fake) -> None:
    found = run(node.config, node.host)
    assert node.faults() == []
    assert able(found)
    assert found[-1].words == "a container was run by runc"
    assert {f.check for f in found} == {
        "permissions",
        "kernel",
        "cgroups",
        "runtimes",
        "settings",
        "network",
        "directories",
        "registries",
        "service",
        "trial",
    }


def test_without_root_nothing_is_tried(node: Fake) -> None:
    def never(*_: object) -> str | None:
        raise AssertionError("it was tried")

    tries = dict.fromkeys(("overlay", "idmap", "link", "iptables", "network", "container"), never)
    node.change(user=lambda: 1000, privileged=False, **tries)
    fault = node.fault()
    assert fault.level is Level.MISSING
    assert "as root" in fault.advice


def test_capabilities_that_root_lacks_are_named(node: Fake) -> None:
    node.write("proc/self/status", f"CapEff:\t{0x1FFFFFFFFFF & ~(1 << 21) & ~(1 << 27):016x}\n")
    assert "SYS_ADMIN, MKNOD" in node.fault().words
    node.write("proc/self/status", f"CapEff:\t{0x1FFFFFFFFFF & ~(1 << 24):016x}\n")
    assert node.fault().level is Level.WARNING


@pytest.mark.parametrize(
    ("path", "level", "words"),
    [
        ("proc/self/ns/net", Level.MISSING, "no net namespaces"),
        ("proc/self/ns/user", Level.WARNING, "hostUsers: false"),
        ("proc/sys/kernel/seccomp/actions_avail", Level.WARNING, "RuntimeDefault"),
        ("proc/sys/net/bridge/bridge-nf-call-iptables", Level.WARNING, "br_netfilter"),
        ("proc/sys/net/ipv4/ip_forward", Level.WARNING, "ip_forward"),
        ("usr/lib/cni/portmap", Level.MISSING, "needs the plugin portmap, not in /opt/cni/bin or /usr/lib/cni"),
        ("usr/lib/cni/host-local", Level.MISSING, "needs the plugin host-local"),
        ("etc/cni/net.d/10-pods.conflist", Level.MISSING, "no CNI configuration in "),
    ],
)
def test_what_is_not_there(node: Fake, path: str, level: Level, words: str) -> None:
    node.remove(path)
    fault = node.fault()
    assert fault.level is level
    assert words in fault.words
    assert fault.advice


@pytest.mark.parametrize(
    ("path", "text", "level", "words"),
    [
        ("proc/sys/user/max_user_namespaces", "0\n", Level.WARNING, "max_user_namespaces is 0"),
        ("proc/sys/net/ipv4/ip_forward", "0\n", Level.WARNING, "pods reach no address outside"),
        ("proc/sys/net/bridge/bridge-nf-call-iptables", "0\n", Level.WARNING, "Services do not work"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io hugetlb\n", Level.MISSING, "controllers memory, pids"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n", Level.WARNING, "huge pages"),
        ("proc/self/mountinfo", LEGACY, Level.MISSING, "no cgroup hierarchy"),
        ("proc/self/mountinfo", MOUNTS.replace("cgroup rw", "cgroup ro"), Level.MISSING, "mounted read-only"),
        (
            "proc/self/mountinfo",
            MOUNTS.replace("/ / rw", "/ / ro"),
            Level.MISSING,
            "root = /var/lib/criserver, on ext4",
        ),
        ("proc/self/mountinfo", MOUNTS.replace("tmpfs", "ext4"), Level.WARNING, "state = /run/criserver, on ext4"),
        ("var/lib/criserver/notes", "", Level.MISSING, "files that criserver did not make (notes)"),
        ("run/criserver/notes", "", Level.MISSING, "no marker (criserver.state)"),
        ("run/containerd/containerd.sock", "", Level.WARNING, "containerd is here too"),
        ("etc/cni/net.d/10-pods.conflist", "{", Level.MISSING, "is not valid JSON"),
        ("run/criserver/criserver.sock", "", Level.MISSING, "is not a socket"),
    ],
)
def test_what_is_not_as_it_should_be(node: Fake, path: str, text: str, level: Level, words: str) -> None:
    node.write(path, text)
    fault = node.fault()
    assert fault.level is level
    assert words in fault.words
    assert fault.advice


@pytest.mark.parametrize(
    ("tries", "level", "words"),
    [
        ({"calls": lambda: ["openat2"]}, Level.MISSING, "Linux 6.1.0 lacks openat2"),
        ({"overlay": lambda _: "it is a network file system"}, Level.MISSING, "it is a network file system"),
        ({"idmap": lambda _: "no id-mapped mounts"}, Level.WARNING, "no pods with user namespaces: no id-mapped"),
        ({"link": lambda kind: "not supported" * (kind == "veth")}, Level.MISSING, "no veth interfaces: not supported"),
        ({"iptables": lambda _: "Table does not exist"}, Level.MISSING, "/usr/bin/iptables does not work: Table"),
        ({"network": lambda _: "bridge speaks 0.4.0 only"}, Level.MISSING, "bridge speaks 0.4.0 only"),
        ({"version": lambda _: None}, Level.MISSING, "/usr/bin/runc --version fails"),
        ({"version": lambda _: "runc version 1.0.3"}, Level.MISSING, "runc version 1.0.3 is too old"),
        ({"features": lambda _: None}, Level.WARNING, "does not report its features"),
        ({"container": lambda *_: "no such device"}, Level.MISSING, "runc cannot run a container here: no such device"),
        ({"synchronised": lambda: False}, Level.WARNING, "the clock is not synchronised"),
    ],
)
def test_what_does_not_work_when_it_is_tried(node: Fake, tries: dict[str, Any], level: Level, words: str) -> None:
    node.change(**tries)
    fault = node.fault()
    assert fault.level is level
    assert words in fault.words


def test_a_handler_that_is_not_the_default_one_is_a_warning(node: Fake) -> None:
    node.configure(runtimes={"runc": RuntimeHandler("runc", "runc"), "crun": RuntimeHandler("crun", "/opt/crun")})
    node.change(which=lambda name: None if "crun" in name else f"/usr/bin/{name}")
    fault = node.fault()
    assert (fault.level, fault.words) == (Level.WARNING, "runtime handler crun: the program /opt/crun is not there")
    node.configure(default_runtime="crun")
    assert node.fault().level is Level.MISSING


def test_a_shim_is_looked_for_by_its_program(node: Fake) -> None:
    node.configure(runtimes={"runc": RuntimeHandler("runc", shim="io.containerd.kata.v2")})
    words = [f.words for f in run(node.config, node.host)]
    assert "runtime handler runc: /usr/bin/containerd-shim-kata-v2, a shim of containerd's kind" in words
    assert not [word for word in words if "a container was run" in word]
    node.change(which=lambda name: None if "kata" in name else f"/usr/bin/{name}")
    fault = node.fault()
    assert (fault.level, fault.words) == (
        *(Level.MISSING, "runtime handler runc: the program containerd-shim-kata-v2 is not there"),
    )
    assert "change shim below [runtimes.runc]" in fault.advice


def test_a_runtime_with_known_escapes_runs_pods_and_is_warned_of(node: Fake) -> None:
    node.change(version=lambda _: "runc version 1.1.5+ds1")
    found = run(node.config, node.host)
    assert able(found)
    assert "a container was run by runc" in [f.words for f in found]
    first, *others = node.faults()
    assert {f.level for f in (first, *others)} == {Level.WARNING}
    assert first.words.startswith("runtime handler runc: runc version 1.1.5+ds1 may have CVE-2024-21626: ")
    assert "install runc 1.1.12 or newer" in first.advice
    assert "apt changelog runc" in first.advice
    assert "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881" in others[0].words
    assert "install runc 1.2.8, 1.3.3, 1.4.0-rc.3 or newer" in others[0].advice
    node.change(version=lambda _: "runc version 1.4.3")
    assert node.faults() == []


def test_what_runs_no_pods_is_told_once(node: Fake) -> None:
    node.change(version=lambda _: "runc version 1.0.3")
    assert "too old" in node.fault().words


def test_a_plugin_with_a_known_fault_where_it_has_it(node: Fake) -> None:
    node.change(plugin_version=lambda path: "CNI portmap plugin v1.8.0" * path.endswith("/usr/lib/cni/portmap"))
    assert node.faults() == [], "it is of the nftables backend alone"
    plugins = [NETWORK["plugins"][0], {"type": "portmap", "backend": "nftables"}]
    node.write("etc/cni/net.d/10-pods.conflist", json.dumps({**NETWORK, "plugins": plugins}))
    fault = node.fault()
    assert fault.level is Level.WARNING
    assert "CNI portmap plugin v1.8.0 may have CVE-2025-67499: " in fault.words
    assert "1.9.0 or newer" in fault.advice
    node.change(plugin_version=lambda _: None)
    assert node.faults() == []


def test_the_trial_needs_no_network_but_all_else(node: Fake) -> None:
    node.remove("etc/cni/net.d/10-pods.conflist")
    assert run(node.config, node.host)[-1].check == "trial"
    node.change(calls=lambda: ["openat2"])
    assert "trial" not in {finding.check for finding in run(node.config, node.host)}


def test_without_the_infra_program_it_says_that_no_container_was_tried(node: Fake) -> None:
    def never(*_: object) -> str | None:
        raise AssertionError("a container was tried")

    node.change(container=never)
    node.remove("usr/bin/catatonit")
    infra, trial = node.faults()
    assert (infra.check, trial.check) == ("runtimes", "trial")
    assert "pods that share a PID namespace cannot run" in infra.words
    assert "no container was tried" in trial.words
    for fault in (infra, trial):
        assert fault.level is Level.WARNING
        assert "apt-get install catatonit" in fault.advice
    runtimes = {"shim": RuntimeHandler("shim", shim="io.containerd.runc.v2")}
    node.configure(runtimes=runtimes, default_runtime="shim")
    assert [fault.check for fault in node.faults()] == ["runtimes"]


def test_iptables_counts_only_for_plugins_that_run_it(node: Fake) -> None:
    node.change(which=lambda name: None if name == "iptables" else f"/usr/bin/{name}")
    assert "apt-get install iptables" in node.fault().advice
    node.write("usr/lib/cni/ptp", "", 0o755)
    plugins = [{"type": "ptp", "ipam": {"type": "host-local"}}, {"type": "portmap", "backend": "nftables"}]
    node.write("etc/cni/net.d/10-pods.conflist", json.dumps({**NETWORK, "plugins": plugins}))
    assert node.faults() == []


def test_apparmor_takes_a_program_to_load_profiles(node: Fake) -> None:
    node.write("sys/module/apparmor/parameters/enabled", "Y\n")
    assert node.faults() == []
    node.change(which=lambda name: None if name == "apparmor_parser" else f"/usr/bin/{name}")
    assert "no profile can be loaded" in node.fault().words


def test_selinux_takes_a_policy_with_types_for_containers(node: Fake) -> None:
    node.write("sys/fs/selinux/enforce", "1")
    node.change(labelled=lambda: True)
    assert node.faults() == []
    node.change(labelled=lambda: False)
    assert node.fault().level is Level.WARNING
    assert "has no types for containers" in node.fault().words


def legacy(*controllers: str) -> str:
    lines = (f"3{n} 21 0:3{n} / /sys/fs/cgroup/{c} rw - cgroup cgroup rw,{c}\n" for n, c in enumerate(controllers))
    return LEGACY + "".join(lines)


def test_version_1_of_cgroups_needs_devices_and_freezer_too(node: Fake) -> None:
    whole = ("cpu", "cpuset", "memory", "pids", "devices", "freezer", "blkio", "hugetlb")
    node.write("proc/self/mountinfo", legacy(*whole))
    assert node.fault().words.startswith("cgroup version 1: ")
    assert node.fault().level is Level.WARNING
    node.write("proc/self/mountinfo", legacy(*(c for c in whole if c not in ("devices", "memory"))))
    assert "controllers memory, devices" in node.fault().words


def test_the_driver_goes_with_what_manages_the_hierarchy(node: Fake) -> None:
    node.configure(cgroup_driver="cgroupfs")
    assert node.fault().level is Level.WARNING
    node.remove("run/systemd/system/.keep")
    (node.root / "run/systemd/system").rmdir()
    assert node.faults() == []
    node.configure(cgroup_driver="systemd")
    assert "systemd does not run here" in node.fault().words
    assert node.fault().level is Level.MISSING


@pytest.fixture
def listener(node: Fake) -> Iterator[socket.socket]:
    os.makedirs(node.root / "run/criserver")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(node.root / "run/criserver/criserver.sock"))
        sock.listen()
        yield sock


def test_another_daemon_at_the_socket(node: Fake, listener: socket.socket) -> None:
    assert "another daemon answers at /run/criserver/criserver.sock" in node.fault().words
    listener.close()
    assert node.faults() == [], "a socket that nobody listens at is no hindrance"


def test_a_daemon_that_serves_already_is_as_it_should_be(node: Fake, listener: socket.socket) -> None:
    path = node.root / "run/criserver/criserver.lock"
    path.write_text(f"{os.getpid()}\n")
    with open(path) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        node.write("proc/locks", Path("/proc/locks").read_text())
        found = run(node.config, node.host)
        node.write("run/containerd/containerd.sock", "")
        assert "containerd is here too" in node.fault().words
        address = "/run/containerd/containerd.sock"
        sharing = dataclasses.replace(node.config, containerd_address=address)
        node.change(which=lambda name: None if name == "containerd" else f"/usr/bin/{name}")
        shared = [f.words for f in run(sharing, node.host) if f.level is Level.WARNING]
        assert shared == [
            f"criserver answers the kubelet's cAdvisor at {address} too, "
            "which kubeadm takes for the socket of containerd"
        ]
    assert able(found)
    assert f"criserver serves at /run/criserver/criserver.sock (PID {os.getpid()})" in [f.words for f in found]
    node.write("proc/locks", Path("/proc/locks").read_text())
    assert not able(run(node.config, node.host)), "what the file says is of a daemon that is gone"


def streaming(config: Config, **keys: Any) -> Config:
    return dataclasses.replace(config, streaming=dataclasses.replace(config.streaming, **keys))


def test_a_streaming_address_that_is_taken_or_of_another_node(node: Fake) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        node.config = streaming(node.config, port=taken.getsockname()[1])
        assert node.fault().level is Level.MISSING
    node.config = streaming(node.config, host="192.0.2.1", port=0)
    assert node.fault().level is Level.MISSING
    node.config = streaming(node.config, host="0.0.0.0")
    assert "can read the data" in node.fault().words


def test_a_certificate_that_is_none(node: Fake, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    node.config = streaming(node.config, tls_cert=str(tmp_path / "key"), tls_key=str(tmp_path / "key"))
    assert "[streaming] tls_cert, tls_key cannot be used" in node.fault().words


def test_a_disk_that_is_small_and_nearly_full(node: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(node.root)
    few = os.statvfs_result((4096, 4096, 1000, 90, 90, 1000, 20, 20, real.f_flag, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    space, small, inodes = node.faults()
    assert "9% of its file system is free" in space.words
    assert "its file system has 3 MiB in all" in small.words
    assert "2% of its file system's inodes" in inodes.words
    assert {space.level, small.level, inodes.level} == {Level.WARNING}


def test_what_cannot_be_looked_at_is_told_and_the_rest_goes_on(node: Fake) -> None:
    def broken(_: str) -> str | None:
        raise OSError("the disk is on fire")

    node.change(overlay=broken)
    found = run(node.config, node.host)
    assert [f.words for f in found if f.level is Level.MISSING] == ["this check failed: the disk is on fire"]
    assert any(f.check == "service" for f in found)
