"""The service stopped, killed, restarted and upgraded beneath running pods; then the package taken away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.node.installed import KUBEPODS, InstalledNode, age, command, eventually, find, shown
from tests.support.node import processes

ECHO = "while read line; do echo got $line; done"
TICKS = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.5; done"


class Pods:
    """A pod of each kind with what must outlive the daemon in it, and what identifies that."""

    def __init__(self, node: InstalledNode) -> None:
        self.node = node
        self.own = node.run_pod("own")
        linux = cri.LinuxPodSandboxConfig(
            cgroup_parent=f"/{KUBEPODS}/kubepods-besteffort-poddef.slice",
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.POD)),
        )
        self.shared = node.run_pod("shared", linux=linux)
        self.ticks = node.run(self.own, "ticks", ["sh", "-c", TICKS])
        self.other = node.run(self.shared, "other", ["sleep", "1000"])
        self.session = node.run(self.shared, "session", ["sh", "-c", ECHO], stdin=True)
        self.said = 0
        self.talk()
        # A command ends with its client, and so with the daemon; what it has left behind in the container does not.
        node.sh(self.ticks, "setsid sleep 4321 </dev/null >/dev/null 2>&1 &")
        eventually(lambda: any(line.startswith("sleep 4321") for _, line in processes()))
        self.known = self.identities()

    def identities(self) -> list[tuple[int, str]]:
        """The processes of the containers, and what a command has left in one."""
        pids = [*map(self.node.pid, (self.ticks, self.other, self.session)), find("sleep 4321")]
        return [(pid, age(pid)) for pid in pids]

    def talk(self) -> None:
        """Say a line to the process that reads its input, in a session that is left open: its daemon may end."""
        self.said += 1
        self.attached = self.node.attach(self.session)
        self.attached.send("stdin", f"{self.said}\n".encode())
        self.attached.until("stdout", f"got {self.said}\n".encode())

    def are_untouched(self) -> None:
        """Everything is as it was, and works."""
        assert self.identities() == self.known
        states = {c.id: c.state for c in self.node.client.ListContainers().containers}
        assert states == dict.fromkeys((self.ticks, self.other, self.session), cri.CONTAINER_RUNNING)
        ready = {p.id for p in self.node.client.ListPodSandbox().items if p.state == cri.SANDBOX_READY}
        assert ready == {self.own, self.shared}
        assert self.node.sh(self.other, "echo hi") == "hi\n"
        self.talk()
        assert self.node.log(self.session).splitlines() == [f"got {n + 1}" for n in range(self.said)]
        before = len(self.node.log(self.ticks).split())
        eventually(lambda: len(self.node.log(self.ticks).split()) > before + 2)
        lines = self.node.log(self.ticks).split()
        assert lines == [str(n + 1) for n in range(len(lines))], "no line of the log is missing or doubled"

    def remove(self) -> None:
        self.node.remove_pods()


@pytest.fixture(autouse=True)
def no_pods_of_an_earlier_test(node: InstalledNode) -> None:
    node.remove_pods()
    shutil.rmtree(node.logs, ignore_errors=True)  # logs stay when containers go, and these have the same names again


def test_a_restart_leaves_containers_and_exit_codes(node: InstalledNode):
    pods = Pods(node)
    script = "while [ ! -e /go ]; do sleep 0.1; done; exit 42"
    ends = node.run(pods.own, "ends", ["sh", "-c", script])
    root = f"/proc/{node.pid(ends)}/root"
    node.systemctl("stop")
    assert not os.path.exists("/sys/fs/cgroup/system.slice/criserver.service"), "nothing is left in the unit"
    with open(f"{root}/go", "w"):
        pass
    eventually(lambda: not os.path.exists(root))
    node.systemctl("start")
    ended = node.wait(ends)
    assert (ended.exit_code, ended.reason) == (42, "Error")
    node.client.RemoveContainer(container_id=ends)
    pods.are_untouched()
    node.systemctl("restart")
    pods.are_untouched()
    pods.remove()


def test_systemd_brings_a_killed_daemon_back(node: InstalledNode):
    pods = Pods(node)
    killed = int(shown("MainPID"))
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: shown("MainPID") not in ("0", str(killed)) and shown("ActiveState") == "active")
    node.client.channel.close()
    node.connect()
    pods.are_untouched()
    pods.remove()


def test_an_upgrade_does_not_touch_pods_and_the_removal_takes_them_along(node: InstalledNode):
    pods = Pods(node)
    version = command("dpkg-query", "--show", "--showformat=${Version}", "criserver")
    daemon = shown("MainPID")
    node.client.channel.close()
    node.install("second.deb")
    assert command("dpkg-query", "--show", "--showformat=${Version}", "criserver") != version
    assert shown("MainPID") not in ("0", daemon)
    pods.are_untouched()

    pids = [pid for pid, _ in pods.known]
    command("dpkg", "--remove", "criserver", seconds=120)
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert leftovers(pods) == []
    assert os.path.exists("/etc/criserver/config.toml")
    assert os.listdir("/var/lib/criserver") != []
    command("dpkg", "--purge", "criserver", seconds=120)
    for path in ("/etc/criserver", "/var/lib/criserver", "/run/criserver", "/usr/lib/criserver"):
        assert not os.path.exists(path), path
    assert subprocess.run(["systemctl", "cat", "criserver"], capture_output=True, check=False).returncode != 0


def leftovers(pods: Pods) -> list[str]:
    """What a clean node would not have."""
    found = mounts.mounts_below("/run/criserver") + mounts.mounts_below("/var/lib/criserver")
    found += [f"process {pid}: {words}" for pid, words in processes() if "criserver" in words and "pytest" not in words]
    units = command("systemctl", "list-units", "--all", "--plain", "--no-legend", "criserver*")
    # Debian masks the unit of a package that is removed and not purged.
    found += [f"unit {line}" for line in units.splitlines() if " masked " not in line]
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        found += [f"cgroup {directory}/{name}" for name in names if "criserver" in name]
    found += [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith("veth")]
    addresses = [name for _, _, names in os.walk("/var/lib/cni/networks") for name in names if name[0].isdigit()]
    found += [f"address {name}" for name in addresses]
    rules = command("iptables-save")
    found += [f"rule {line}" for line in rules.splitlines() if pods.own in line or pods.shared in line]
    return found
