"""The last release's package upgraded beneath running pods; then the package taken away.

The node is upgraded once. Each test looks at one side of what the pods of the release are afterwards; the last two take
them away.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import migrations
from tests.node.installed import PACKAGES, InstalledNode, command, in_time, shown
from tests.node.pods import Pods, leftovers
from tests.support.node import UNTIL_GO
from tests.support.pods import BASE, shared, userns
from tests.support.streaming_client import Spdy
from tests.support.waiting import SLOWNESS
from tests.vm.releases import EARLIER_PACKAGE, LAST, NO_HISTORY, PRESENT_PACKAGE, RELEASED_PACKAGE

HANDLERS = """
[runtimes.runc]
path = "runc"
[runtimes.newer]
path = "{CRISERVER_TEST_RUNC}"
[runtimes.crun]
path = "{CRISERVER_TEST_CRUN}"
"""
DATABASE = "/var/lib/criserver/criserver.db"

# The fixture upgrades a node and makes a dozen containers, which an emulated processor takes its time for.
pytestmark = pytest.mark.timeout(900 * SLOWNESS)


class EveryKind(Pods):
    """A pod of each kind that a release could run, and a container in each state."""

    def __init__(self, node: InstalledNode) -> None:
        super().__init__(node)
        everything = shared(network=cri.NODE, pid=cri.NODE, ipc=cri.NODE)
        self.host = node.run_pod("host", linux=everything)
        self.crun = self.run_pod("crun", "crun", shared())
        self.users = self.run_pod("users", "newer", userns())
        self.stopped = node.run_pod("stopped")
        node.client.StopPodSandbox(pod_sandbox_id=self.stopped)
        self.in_host = node.run(self.host, "sleeps", ["sleep", "1000"])
        self.in_crun = node.run(self.crun, "sleeps", ["sleep", "1000"])
        self.in_users = node.run(self.users, "sleeps", ["sleep", "1000"])
        self.terminal = node.run(self.own, "terminal", ["sh"], stdin=True, tty=True)
        self.later = node.run(self.own, "later", ["sh", "-c", f"{UNTIL_GO}; exit 7"])
        self.created = node.create(self.own, "created", ["sh", "-c", "cat /etc/hosts; sleep 1000"])
        self.exited = node.run(self.own, "exited", ["sh", "-c", "echo over; exit 3"])
        node.wait(self.exited)
        self.running += [self.in_host, self.in_crun, self.in_users, self.terminal, self.later]
        self.pods = (self.own, self.shared, self.host, self.crun, self.users)
        self.hosts = {pod: node.sh(container, "cat /etc/hosts") for pod, container in self.one_in_each()}
        self.note()
        self.told = self.statuses()
        self.package = installed()
        # Exits while no daemon runs: the old one has gone, and the new one is not there yet.
        wait = f"while [ -d /proc/{shown('MainPID')} ]; do sleep 0.1; done; exit 42"
        self.ends = node.run(self.host, "ends", ["sh", "-c", wait])

    def run_pod(self, name: str, handler: str, linux: cri.LinuxPodSandboxConfig) -> str:
        config = self.node.pod(name, linux=linux)
        pod: str = self.node.client.RunPodSandbox(config=config, runtime_handler=handler).pod_sandbox_id
        return pod

    def one_in_each(self) -> list[tuple[str, str]]:
        """The pods, each with a container that runs in it."""
        return list(zip(self.pods, (self.ticks, self.other, self.in_host, self.in_crun, self.in_users), strict=True))

    def statuses(self) -> dict[str, cri.PodSandboxStatus | cri.ContainerStatus]:
        """All that a kubelet is told of each pod and container."""
        client = self.node.client
        found = {pod: client.PodSandboxStatus(pod_sandbox_id=pod).status for pod in (*self.pods, self.stopped)}
        return found | {key: self.node.status(key) for key in (*self.running, self.created, self.exited)}


def installed() -> str:
    """The version of the package."""
    return command("dpkg-query", "--show", "--showformat=${Version}", "criserver")


def stored(table: str, key: str) -> dict[str, object]:
    """A record as it is in the daemon's database."""
    db = sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)
    try:
        (value,) = db.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
        return json.loads(value)
    finally:
        db.close()


def released() -> bool:
    return os.path.exists(f"{PACKAGES}/{RELEASED_PACKAGE}")


@pytest.fixture(scope="module")
def pods(busybox_archive: str) -> EveryKind:
    """The pods of the release, after the upgrade."""
    command("dpkg", "--purge", "criserver", seconds=120)
    shutil.rmtree("/var/log/pods", ignore_errors=True)  # of earlier tests, whose pods have the same names
    node = InstalledNode()
    node.install(RELEASED_PACKAGE if released() else EARLIER_PACKAGE)
    with open(node.config, "a") as f:
        f.write(HANDLERS.format_map(os.environ))
    node.systemctl("restart")
    command("criserver", "image", "import", busybox_archive)
    pods = EveryKind(node)
    daemon = shown("MainPID")
    node.client.channel.close()
    node.install(PRESENT_PACKAGE)
    assert shown("MainPID") not in ("0", daemon)
    return pods


def test_a_release_was_upgraded(pods: EveryKind) -> None:
    assert installed() != pods.package
    assert pods.node.client.Version().runtime_version == command("criserver", "--version").split()[1]
    if not released():
        pytest.skip(f"the package that was upgraded is another build of the present one: {NO_HISTORY}")
    assert pods.package.startswith(f"{LAST}-")


def test_processes_and_logs_are_untouched(pods: EveryKind) -> None:
    pods.are_untouched()


def test_a_kubelet_is_told_the_same(pods: EveryKind) -> None:
    """But for what 0.2.0 told otherwise: the stop signal of the request alone, and the addresses of a stopped pod."""
    now = pods.statuses()
    for statuses in (now, pods.told):
        statuses[pods.stopped].ClearField("network")
        for status in statuses.values():
            if isinstance(status, cri.ContainerStatus):
                status.ClearField("stop_signal")
    assert now == pods.told


def test_an_exit_while_no_daemon_ran_has_its_code(pods: EveryKind) -> None:
    ended = pods.node.wait(pods.ends)
    assert (ended.exit_code, ended.reason) == (42, "Error")


def test_commands_run_in_pods_of_every_kind(pods: EveryKind) -> None:
    for _, container in pods.one_in_each():
        session = pods.node.exec(container, "sh", "-c", "read line; echo got $line; exit 5")
        session.send("stdin", b"it\n")
        assert session.finish()["details"]["causes"] == [{"reason": "ExitCode", "message": "5"}]
        assert session.got["stdout"] == b"got it\n"
    assert pods.node.sh(pods.in_users, "cat /proc/self/uid_map").split() == ["0", str(BASE), "65536"]


def test_a_terminal_can_be_attached_to_and_has_its_size(pods: EveryKind) -> None:
    url = pods.node.client.Attach(container_id=pods.terminal, stdin=True, stdout=True, tty=True).url
    session = Spdy(url).open_command("error", "stdin", "stdout", "resize")
    session.send("resize", b'{"Width":132,"Height":43}')
    in_time(lambda: pods.node.sh(pods.terminal, "stty size </dev/console") == "43 132\n")
    session.send("stdin", b"stty size\n")
    session.until("stdout", b"43 132")
    session.close()


def test_limits_are_changed_and_statistics_measured(pods: EveryKind) -> None:
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    pods.node.client.UpdateContainerResources(container_id=pods.ticks, linux=limits)
    assert pods.node.sh(pods.ticks, "cat /sys/fs/cgroup/memory.max") == f"{64 << 20}\n"
    measured = pods.node.client.ContainerStats(container_id=pods.ticks).stats
    assert measured.cpu.usage_core_nano_seconds.value > 0
    assert measured.memory.working_set_bytes.value > 0


def test_a_log_is_reopened_after_rotation(pods: EveryKind) -> None:
    path = pods.node.status(pods.session).log_path
    os.rename(path, f"{path}.1")
    pods.node.client.ReopenContainerLog(container_id=pods.session)
    pods.said, before = 0, pods.said
    pods.talk()
    assert pods.node.log(pods.session) == "got 1\n"
    with open(f"{path}.1") as f:
        assert len(f.readlines()) == before


def test_a_container_of_the_release_is_started_and_sees_its_pods_files(pods: EveryKind) -> None:
    pods.node.client.StartContainer(container_id=pods.created)
    in_time(lambda: pods.node.log(pods.created) == pods.hosts[pods.own])


def test_the_files_of_a_pod_are_where_this_version_keeps_them(pods: EveryKind) -> None:
    for pod in pods.pods:
        assert sorted(os.listdir(f"/var/lib/criserver/sandboxes/{pod}")) == ["hostname", "hosts", "resolv.conf"]
    for pod, container in ((pods.shared, pods.other), (pods.users, pods.in_users)):
        assert pods.node.sh(container, "cat /etc/hosts") == pods.hosts[pod]
        late = pods.node.run(pod, "late", ["sleep", "1000"])
        assert pods.node.sh(late, "cat /etc/hosts") == pods.hosts[pod]
        names = "for name in net ipc uts; do readlink /proc/self/ns/$name; done"
        assert pods.node.sh(late, names) == pods.node.sh(container, names)


def test_an_exit_has_its_code_and_its_record_todays_version(pods: EveryKind) -> None:
    pods.node.sh(pods.later, "touch /go")
    assert pods.node.wait(pods.later).exit_code == 7
    record = stored("containers", pods.later)
    assert (record["version"], record["exit_code"]) == (migrations.newest(migrations.CONTAINER), 7)


def test_containers_and_pods_are_stopped_and_removed(pods: EveryKind) -> None:
    client = pods.node.client
    client.StopContainer(container_id=pods.session, timeout=0)
    assert pods.node.status(pods.session).exit_code == 137
    for container in (pods.session, pods.exited, pods.in_crun, pods.in_users):
        client.RemoveContainer(container_id=container)
    gone = (pods.crun, pods.users, pods.stopped)
    for pod in gone:
        client.StopPodSandbox(pod_sandbox_id=pod)
        client.RemovePodSandbox(pod_sandbox_id=pod)
    assert {pod.id for pod in client.ListPodSandbox().items} == {pods.own, pods.shared, pods.host}
    for pod in gone:
        assert not os.path.exists(f"/var/lib/criserver/sandboxes/{pod}")


def test_the_removal_of_the_package_takes_the_rest_along(pods: EveryKind) -> None:
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
