"""Nodes for tests of alerts: a Prometheus scrapes them, and a table has the cause of each alert.

Prometheus has the project's own rules, in which a minute is a second.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.frozen_disk import give_disk
from tests.support.node import RUNTIME, Node, handler
from tests.support.pages import ROOT
from tests.support.prometheus import Prometheus, in_seconds, scraping
from tests.support.registry import free_port
from tests.support.shell_network import REFUSES, network_of
from tests.support.waiting import end, eventually

# Seconds that an alert has to fire. The longest takes 30.
PATIENCE = 120
# Alerts about time: a busy machine may be cause enough. Slow calls are stuck ones where a minute is a second.
OF_TIME = (
    "CriserverDown",
    "CriserverRpcsStuck",
    "CriserverPodStartSlow",
    "CriserverDatabaseSlow",
    "CriserverEventLoopSlow",
)
# An OCI runtime of two handlers: "failing" starts nothing, and "slow" takes 11 s while there is a file "slow-starts".
RUNTIMES = """#!/bin/sh
case "${{0##*/}} $* " in
"failing "*" run "*) echo "the kernel is too old" >&2; exit 1;;
"slow "*" run "*) n=0; while [ $n -lt 22 ] && [ -e {base}/slow-starts ]; do sleep 0.5; n=$((n+1)); done;;
esac
exec {runtime} "$@"
"""
# A CNI plugin. It refuses all pods but two:
# 1. "standing": while there is a file "stands", its network is not undone.
# 2. "cut": while there is a file "hangs", its network is not made. It is undone only if there is a file "undoable".
PLUGIN = f"""
ADD) case $CNI_ARGS in
    *POD_NAME=standing*) echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.9.9.9/24"}}]}}';;
    *POD_NAME=cut*) touch BASE/adding; while [ -e BASE/hangs ]; do sleep 0.1; done; exit 1;;
    *) {REFUSES}
    esac;;
DEL) case $CNI_ARGS in
    *POD_NAME=standing*) while [ -e BASE/stands ]; do sleep 0.1; done;;
    *POD_NAME=cut*) [ -e BASE/undoable ] || {{ {REFUSES.removesuffix(";")} }};;
    esac;;
"""
OPTIONS = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
HOST_NETWORK = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=OPTIONS))


@dataclass
class AlertNodes:
    """The nodes by their names, their addresses of metrics, what scrapes them, and the causes that are being made."""

    all: dict[str, Node]
    addresses: dict[str, str]
    log_reader: subprocess.Popen[bytes]
    prometheus: Prometheus
    causes: dict[str, Future[None]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def again(self, call: Callable[[], object], alert: str, pause: float = 1, **labels: str) -> None:
        """Call again and again, with pauses in seconds, until this alert fires for its node. A call may fail."""
        instance = self.addresses[CAUSES[alert].node]

        def fires() -> bool:
            if self.prometheus.fires(alert, instance=instance, **labels):
                return True
            with contextlib.suppress(grpc.RpcError):
                call()
            return False

        eventually(fires, PATIENCE, lambda: f"{alert} does not fire: {self.prometheus.asked('alerts')}", pause)

    def fired(self, *alerts: str) -> None:
        """Wait for other alerts, whose causes one more cause would disturb. Each has a test of its own."""
        wait([self.causes[alert] for alert in alerts])

    def fired_ever(self) -> set[tuple[str, str]]:
        """The alerts that have fired, each with its instance; without those that are about time."""
        query = f'count_over_time(ALERTS{{alertstate="firing", alertname!~"{"|".join(OF_TIME)}"}}[30m])'
        found = [series["metric"] for series in self.prometheus.asked("query", query=query)["result"]]
        return {(labels["alertname"], labels["instance"]) for labels in found}

    def host_pod(self, node: Node, **fields: Any) -> str:
        """A pod in the network of its node."""
        return node.run_pod(f"pod{next(self.numbers)}", linux=HOST_NETWORK, **fields)

    def daemon_log(self) -> str:
        """The last lines of all, for the report of a failure."""
        return "\n".join(line for node in self.all.values() for line in node.daemon_log().splitlines()[-60:])


class Cause(NamedTuple):
    """What makes an alert fire on a node; it returns once the alert fires."""

    node: str
    make: Callable[[AlertNodes, Node], None]


CAUSES: dict[str, Cause] = {}


def cause(node: str, alert: str) -> Callable[[Callable[[AlertNodes, Node], None]], Callable[[AlertNodes, Node], None]]:
    """Keep a function as the cause of an alert. A cause that waits for another alert is defined after that one."""

    def kept(make: Callable[[AlertNodes, Node], None]) -> Callable[[AlertNodes, Node], None]:
        CAUSES[alert] = Cause(node, make)
        return make

    return kept


@contextlib.contextmanager
def scraped(archive: str, directory: Path) -> Iterator[AlertNodes]:
    """The nodes, whose daemons run and have been scraped for some time. Files of Prometheus are in ``directory``."""
    with contextlib.ExitStack() as closing:
        made = {name: closing.enter_context(unstarted()) for name in ("failing", "slow", "ending")}
        addresses = {name: f"127.0.0.1:{free_port()}" for name in made}
        for name, node in made.items():
            with open(node.config, "a") as f:
                f.write(f'[metrics]\naddress = "{addresses[name]}"\n')
        give_handlers(made["failing"])
        give_disk(made["slow"])
        reader = closing.enter_context(read_by_another(made["failing"]))
        with ThreadPoolExecutor(len(made)) as pool:
            list(pool.map(Node.start, made.values()))
        import_image(made["failing"], archive)
        rules = in_seconds(ROOT / "contrib/prometheus/criserver.rules.yml", directory)
        prometheus = closing.enter_context(scraping(list(addresses.values()), directory, [rules]))
        nodes = AlertNodes(made, addresses, reader, prometheus)
        values = "count_over_time(instance:criserver_event_loop_lag_seconds:p99_rate5m[1m])"
        eventually(lambda: float(prometheus.value(f"count({values} >= 3)") or 0) == len(made))
        yield nodes


@contextlib.contextmanager
def unstarted() -> Iterator[Node]:
    """A node whose daemon does not run. Its network is the plugin."""
    node = Node()
    try:
        with network_of(node, PLUGIN.replace("BASE", node.base)):
            yield node
    finally:
        node.close()


def give_handlers(node: Node) -> None:
    """Have handlers "failing" and "slow", whose OCI runtime is so."""
    for name in ("failing", "slow"):
        program = Path(node.base, name)
        program.write_text(RUNTIMES.format(base=node.base, runtime=shutil.which(RUNTIME)))
        program.chmod(0o755)
        with open(node.config, "a") as f:
            f.write(handler(name, str(program)))


@contextlib.contextmanager
def read_by_another(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    """The process that reads the log of the daemon from a pipe, as journald does, and writes it to the log's file."""
    pipe = f"{node.base}/log.pipe"
    os.mkfifo(pipe)
    opened = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)  # so that there is always a writer, and a reader
    with open(f"{node.base}/daemon.log", "ab") as log:
        reader = subprocess.Popen(["cat", pipe], stdout=log)
    node.python, node.program = "sh", ["-c", f'exec "$0" -m criserver "$@" 2>{pipe}', sys.executable]
    try:
        yield reader
    finally:
        end(reader, 10)
        os.close(opened)
