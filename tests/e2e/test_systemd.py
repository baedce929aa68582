"""The daemon as a service of systemd: the unit as it is shipped, started, restarted, wedged and stopped."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.node import UNTIL_GO, Client, Node, go
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(not os.path.isdir("/run/systemd/system"), reason="systemd is not this machine's init")

ROOT = Path(__file__).parents[2]
UNIT = "criserver-e2e.service"
CGROUP = f"/system.slice/{UNIT}"


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}\n{journal('-o', 'cat')}"
    return done.stdout


def shown(name: str) -> str:
    return systemctl("show", "--value", f"--property={name}", UNIT).strip()


def journal(*words: str) -> str:
    command = ["journalctl", "--quiet", "--boot", f"--unit={UNIT}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def in_time(found: Callable[[], Any], seconds: float = 60) -> Any:
    return eventually(found, seconds, told=lambda: journal("-o", "cat"), every=0.2)


class Service(Node):
    """A node whose daemon is systemd's: the unit of contrib/, with this installation and a shorter patience."""

    def __init__(self) -> None:
        super().__init__()
        Path(self.config).write_text(Path(self.config).read_text().replace('format = "json"', 'format = "auto"'))
        unit = (ROOT / "contrib/systemd/criserver.service").read_text()
        command = f"{sys.executable} -m criserver serve --config {self.config}"
        unit = unit.replace("/usr/bin/criserver serve --config /etc/criserver/config.toml", command)
        unit = unit.replace("WatchdogSec=60", "WatchdogSec=8\nTimeoutAbortSec=2")
        assert command in unit
        assert "WatchdogSec=8" in unit
        unit = unit.replace("[Service]\n", f"[Service]\nEnvironment=PYTHONPATH={ROOT}\n")
        Path(f"/run/systemd/system/{UNIT}").write_text(unit)
        systemctl("daemon-reload")

    def start(self, *, recovered: bool = True) -> None:
        """Start the service; when that returns it has to serve. Its log, and so its recovery, is the journal's."""
        systemctl("start", UNIT)
        self.client = Client(self.socket)
        self.client.Version(deadline=30)

    def close(self) -> None:
        """Undo everything."""
        try:
            self.start()
            self.remove_pods()
            self.client.channel.close()
        finally:
            systemctl("stop", UNIT)
            os.unlink(f"/run/systemd/system/{UNIT}")
            systemctl("daemon-reload")
            super().close()


@pytest.fixture(scope="module")
def service(nothing_left: None, busybox_archive: str) -> Iterator[Service]:
    service = Service()
    try:
        service.start()
        import_image(service, busybox_archive)
        yield service
    finally:
        service.close()


@pytest.fixture(autouse=True)
def no_pods(service: Service) -> Iterator[None]:
    yield
    service.start()
    service.remove_pods()
    assert service.settled() == []


def main_pid() -> int:
    return int(shown("MainPID"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_started_means_that_it_serves_and_its_status_tells_of_pods(service: Service) -> None:
    service.run(service.run_pod(), "c", ["sleep", "1000"])
    assert shown("StatusText")
    in_time(lambda: shown("StatusText") == "1 pods ready, 1 containers running")


def test_a_restart_leaves_containers_and_commands_in_them_alone(service: Service) -> None:
    pod = service.run_pod()
    stays = service.run(pod, "stays", ["sleep", "1000"])
    ends = service.run(pod, "ends", ["sh", "-c", f"{UNTIL_GO}; exit 42"])
    pid, before = service.pid(stays), main_pid()
    subprocess.run(["journalctl", "--sync"], check=True)
    service.client.channel.close()
    systemctl("restart", UNIT)
    service.client = Client(service.socket)
    assert main_pid() != before
    assert service.pid(stays) == pid
    assert service.sh(stays, "echo still here") == "still here\n"
    service.sh(ends, "touch /go")
    assert service.wait(ends).exit_code == 42
    assert "left-over process" not in journal("-o", "cat")


def test_an_exit_while_the_service_is_stopped_is_not_lost(service: Service) -> None:
    pod = service.run_pod()
    container = service.run(pod, "c", ["sh", "-c", f"{UNTIL_GO}; exit 7"])
    pid = service.pid(container)
    systemctl("stop", UNIT)
    assert shown("ActiveState") == "inactive"
    # Nothing is left in the unit: what goes on is elsewhere.
    assert not os.path.exists(f"/sys/fs/cgroup{CGROUP}")
    go(pid)
    in_time(lambda: os.path.exists(f"{service.state}/containers/{container}/exit.json"))
    service.client.channel.close()
    service.start()
    assert service.status(container).exit_code == 7


def test_shims_are_not_in_the_services_cgroup(service: Service) -> None:
    container = service.run(service.run_pod(), "c", ["sleep", "1000"])
    shim = parent_of(service.pid(container))
    cgroup = Path(f"/proc/{shim}/cgroup").read_text().strip()
    assert cgroup.startswith("0::/system.slice/criserver-shims-")
    assert cgroup.endswith(".scope")
    assert Path(f"/sys/fs/cgroup{CGROUP}/cgroup.procs").read_text().split() == [str(main_pid())]


def test_a_wedged_daemon_is_started_again_and_containers_stay(service: Service) -> None:
    container = service.run(service.run_pod(), "c", ["sleep", "1000"])
    pid, before = service.pid(container), main_pid()
    os.kill(before, signal.SIGSTOP)
    in_time(lambda: main_pid() not in (0, before) and shown("ActiveState") == "active")
    assert "watchdog" in shown("Result") or "Watchdog timeout" in journal("-o", "cat")
    service.client.channel.close()
    service.client = Client(service.socket)
    service.client.Version(deadline=30)
    assert service.pid(container) == pid
    assert service.status(container).state == cri.CONTAINER_RUNNING


def test_what_is_inherited(service: Service) -> None:
    container = service.run(
        service.run_pod(),
        "c",
        ["sleep", "1000"],
        linux=cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(oom_score_adj=321)),
    )
    pid = service.pid(container)
    shim = parent_of(pid)
    scores = [int(Path(f"/proc/{p}/oom_score_adj").read_text()) for p in (main_pid(), shim, pid)]
    assert scores == [-999, -999, 321]
    files = [resource.prlimit(p, resource.RLIMIT_NOFILE) for p in (main_pid(), pid)]
    assert files == [(1 << 20, 1 << 20), (1024, 1 << 20)]
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            assert int(line.split()[1], 16) == 0
        if line.startswith(("NoNewPrivs:", "Seccomp:")):
            assert line.split()[1] == "0"


def test_the_journal_has_fields(service: Service) -> None:
    container = service.run(service.run_pod(), "c", ["sleep", "1000"])

    def entries() -> list[dict[str, str]]:
        lines = journal("-o", "json", f"CRI_CONTAINER={container}").splitlines()
        return [e for e in map(json.loads, lines) if e["MESSAGE"].startswith("container started")]

    in_time(lambda: len(entries()) == 1)
    (entry,) = entries()
    assert f"container={container} pid={service.pid(container)}" in entry["MESSAGE"]
    assert (entry["CRI_POD"], entry["CRI_NAME"], entry["CRI_RPC"]) == ("e2e/pod", "c", "StartContainer")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("6", "criserver")
    assert entry["_SYSTEMD_UNIT"] == UNIT
    assert entry["_TRANSPORT"] == "journal"
