"""Pods on the installed node that a restart or an upgrade must not touch, and what no pod may leave."""

from __future__ import annotations

import os

from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.node.installed import KUBEPODS, InstalledNode, age, command, find, in_time
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
        in_time(lambda: any(line.startswith("sleep 4321") for _, line in processes()))
        self.running = [self.ticks, self.other, self.session]
        self.note()

    def note(self) -> None:
        """Remember what must stay as it is."""
        self.known = self.identities()
        self.states = self.shown()

    def identities(self) -> list[tuple[int, str]]:
        """The processes of the containers, and what a command has left in one."""
        pids = [*map(self.node.pid, self.running), find("sleep 4321")]
        return [(pid, age(pid)) for pid in pids]

    def shown(self) -> dict[str, int]:
        """The states of all pods and containers, by ID."""
        pods, containers = self.node.client.ListPodSandbox().items, self.node.client.ListContainers().containers
        return {each.id: each.state for each in (*pods, *containers)}

    def talk(self) -> None:
        """Say a line to the process that reads its input, in a session that is left open: its daemon may end."""
        self.said += 1
        self.attached = self.node.attach(self.session)
        self.attached.send("stdin", f"{self.said}\n".encode())
        self.attached.until("stdout", f"got {self.said}\n".encode())

    def are_untouched(self) -> None:
        """Everything is as it was, and works."""
        assert self.identities() == self.known
        shown = self.shown()
        assert {key: shown.get(key) for key in self.states} == self.states
        assert self.node.sh(self.other, "echo hi") == "hi\n"
        self.talk()
        assert self.node.log(self.session).splitlines() == [f"got {n + 1}" for n in range(self.said)]
        before = len(self.node.log(self.ticks).split())
        in_time(lambda: len(self.node.log(self.ticks).split()) > before + 2)
        lines = self.node.log(self.ticks).split()
        assert lines == [str(n + 1) for n in range(len(lines))], "no line of the log is missing or doubled"

    def remove(self) -> None:
        self.node.remove_pods()


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
