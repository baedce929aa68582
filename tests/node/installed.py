"""The node that the tests run on: the Debian package's own daemon, under systemd, with the package's configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from tests.support.node import Client, Node, processes
from tests.support.streaming_client import Spdy
from tests.support.waiting import SLOWNESS, eventually

PACKAGES = os.environ.get("CRISERVER_NODE_PACKAGES", "")  # the directory with the packages of tests/vm/releases.py
SOCKET = "/run/criserver/criserver.sock"
KUBEPODS = "kubepods.slice/kubepods-besteffort.slice"
NETWORK = "/etc/cni/net.d/10-bridge.conflist"


def command(*words: str, seconds: float = 60) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds * SLOWNESS)
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}\n{journal()}"
    return done.stdout


def journal(*words: str) -> str:
    """The end of the service's journal."""
    whole = ["journalctl", "--quiet", "--unit=criserver", "--no-pager", "--lines=60", *words]
    return subprocess.run(whole, capture_output=True, text=True, check=False).stdout


def shown(name: str) -> str:
    """A property of the service."""
    return command("systemctl", "show", "--value", f"--property={name}", "criserver").strip()


class InstalledNode(Node):
    """The service. Its directories are the package's, and nothing of it is undone: the machine is thrown away."""

    def __init__(self) -> None:
        self.base = self.state = "/run/criserver"
        self.root = "/var/lib/criserver"
        self.logs = "/var/log/pods"
        self.config = "/etc/criserver/config.toml"
        self.socket = SOCKET
        self.process = None
        self.described = {}
        type(self).pods = set()

    def install(self, name: str) -> None:
        """Install or upgrade the package; systemd starts the service, and again after an upgrade."""
        # A changed configuration is kept, as an unattended upgrade keeps it.
        command("dpkg", "--install", "--force-confold", f"{PACKAGES}/{name}", seconds=120)
        if not os.path.exists(NETWORK):
            os.makedirs(os.path.dirname(NETWORK), exist_ok=True)
            shutil.copy("/usr/share/doc/criserver/examples/10-bridge.conflist", NETWORK)
        self.connect()

    def connect(self) -> None:
        """A client of the daemon of this moment."""
        self.client = Client(self.socket)
        self.client.Version(deadline=60)

    def systemctl(self, verb: str) -> None:
        """Start, stop or restart the service; after a start it has to serve at once."""
        command("systemctl", verb, "criserver", seconds=120)
        if verb != "stop":
            self.client.channel.close()
            self.client = Client(self.socket)
            self.client.Version(deadline=10)

    def exec(self, container: str, *words: str) -> Spdy:
        """A command with a stream each way, as kubectl exec has it."""
        url = self.client.Exec(container_id=container, cmd=words, stdin=True, stdout=True, stderr=True).url
        return Spdy(url).open_command("error", "stdin", "stdout", "stderr")

    def attach(self, container: str) -> Spdy:
        """A session with a container's process."""
        url = self.client.Attach(container_id=container, stdin=True, stdout=True).url
        return Spdy(url).open_command("error", "stdin", "stdout")


def age(pid: int) -> str:
    """When a process began: with its number that is what tells it from any other."""
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[19]


def find(words: str) -> int:
    """The one process with these words in its command line."""
    (pid,) = (pid for pid, line in processes() if line.startswith(words))
    return pid


def in_time(found: Callable[[], object], seconds: float = 20) -> None:
    """Wait until it is so."""
    eventually(found, seconds, told=journal, every=0.1)
