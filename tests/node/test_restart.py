"""The service stopped, restarted and killed beneath running pods."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.node.installed import InstalledNode, in_time, shown
from tests.node.pods import Pods
from tests.support.node import UNTIL_GO, go


@pytest.fixture(scope="module")
def pods(node: InstalledNode) -> Iterator[Pods]:
    """The same pods for all tests here: an emulated processor takes its time to make them."""
    node.remove_pods()
    shutil.rmtree(node.logs, ignore_errors=True)  # logs stay when containers go, and these have the same names again
    pods = Pods(node)
    yield pods
    pods.remove()


def test_a_restart_leaves_containers_and_exit_codes(node: InstalledNode, pods: Pods) -> None:
    ends = node.run(pods.own, "ends", ["sh", "-c", f"{UNTIL_GO}; exit 42"])
    pid = node.pid(ends)
    node.systemctl("stop")
    assert not os.path.exists("/sys/fs/cgroup/system.slice/criserver.service"), "nothing is left in the unit"
    go(pid)
    in_time(lambda: not os.path.exists(f"/proc/{pid}/root"))
    node.systemctl("start")
    ended = node.wait(ends)
    assert (ended.exit_code, ended.reason) == (42, "Error")
    node.client.RemoveContainer(container_id=ends)
    pods.are_untouched()
    node.systemctl("restart")
    pods.are_untouched()


def test_systemd_brings_a_killed_daemon_back(node: InstalledNode, pods: Pods) -> None:
    killed = int(shown("MainPID"))
    os.kill(killed, signal.SIGKILL)
    in_time(lambda: shown("MainPID") not in ("0", str(killed)) and shown("ActiveState") == "active")
    node.client.channel.close()
    node.connect()
    pods.are_untouched()
