"""Each alert of contrib/prometheus fires by its cause: real daemons, and a real Prometheus that scrapes them.

Prometheus has the project's own rules, in which a minute is a second. All causes are made side by side on three nodes:

1. ``failing``: parts around the daemon fail;
2. ``slow``: the disk of the daemon stands still again and again;
3. ``ending``: the daemon itself is stopped and killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.alert_nodes import CAUSES, HOST_NETWORK, OF_TIME, AlertNodes, cause, scraped
from tests.support.freezer import Freezer
from tests.support.frozen_disk import frozen
from tests.support.node import Node, filled
from tests.support.registry import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not on PATH (Debian's package prometheus)"
)

SHARED = cri.NamespaceOption(network=cri.NODE, pid=cri.POD)
SHARED_PIDS = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=SHARED))

# The node "failing"


@cause("failing", "CriserverCniFailing")
def a_plugin_refuses_pods(nodes: AlertNodes, node: Node) -> None:
    nodes.again(lambda: node.run_pod("refused"), "CriserverCniFailing", plugin="stuck", verb="ADD")


@cause("failing", "CriserverRpcFaults")
def calls_fail(nodes: AlertNodes, node: Node) -> None:
    nodes.again(lambda: node.run_pod("failed"), "CriserverRpcFaults")


@cause("failing", "CriserverRpcsStuck")
def a_call_waits_and_callers_give_up(nodes: AlertNodes, node: Node) -> None:
    """One caller waits for a network plugin that does not end; others have deadlines, as a kubelet has."""
    standing = node.run_pod("standing")
    Path(node.base, "stands").touch()
    # Each has its turn for as long as a network plugin may take.
    stops = [node.client.StopPodSandbox.begin(pod_sandbox_id=standing) for _ in range(12)]
    try:
        give_up = functools.partial(node.client.RemovePodSandbox, pod_sandbox_id=standing, deadline=1)
        nodes.again(give_up, "CriserverRpcsStuck", method="RemovePodSandbox")
        nodes.again(lambda: None, "CriserverRpcsStuck", method="StopPodSandbox")
    finally:
        os.unlink(f"{node.base}/stands")
        for stop in stops:
            stop.cancel()


@cause("failing", "CriserverPodStartSlow")
def the_runtime_takes_long(nodes: AlertNodes, node: Node) -> None:
    pod = nodes.host_pod(node, handler="slow")
    Path(node.base, "slow-starts").touch()
    starts = []

    def start() -> None:
        container = node.create(pod, f"c{next(nodes.numbers)}", ["true"])
        starts.append(node.client.StartContainer.begin(container_id=container))

    try:
        nodes.again(start, "CriserverPodStartSlow", method="StartContainer", pause=2)
    finally:
        os.unlink(f"{node.base}/slow-starts")
        for begun in starts:
            begun.result()


@cause("failing", "CriserverRuntimeFailing")
def the_runtime_fails(nodes: AlertNodes, node: Node) -> None:
    pod = nodes.host_pod(node, handler="failing")

    def start() -> None:
        node.run(pod, f"c{next(nodes.numbers)}", ["true"])

    nodes.again(start, "CriserverRuntimeFailing", handler="failing")


@cause("failing", "CriserverImagePullsFailing")
def nothing_listens_where_a_registry_was(nodes: AlertNodes, node: Node) -> None:
    dead = f"127.0.0.1:{free_port()}"
    image = cri.ImageSpec(image=f"{dead}/a:latest")
    nodes.again(lambda: node.client.PullImage(image=image), "CriserverImagePullsFailing", registry=dead)


@cause("failing", "CriserverShimsLost")
def a_shim_is_killed(nodes: AlertNodes, node: Node) -> None:
    """In a pod that has an infra process, whose shim is there."""
    container = node.run(node.run_pod("shared", linux=SHARED_PIDS), "c", ["sleep", "1000"])
    (shim,) = Freezer(node).shims(container).values()
    os.kill(shim, signal.SIGKILL)
    nodes.again(lambda: None, "CriserverShimsLost")


@cause("failing", "CriserverLogRecordsDropped")
def the_reader_of_the_log_stands_still(nodes: AlertNodes, node: Node) -> None:
    nodes.log_reader.send_signal(signal.SIGSTOP)
    try:
        nodes.again(node.client.Version, "CriserverLogRecordsDropped", pause=0.01)
    finally:
        nodes.log_reader.send_signal(signal.SIGCONT)


@cause("failing", "CriserverDatabaseWritesFailing")
def the_disk_is_full(nodes: AlertNodes, node: Node) -> None:
    nodes.fired(
        "CriserverCniFailing", "CriserverRpcFaults", "CriserverRpcsStuck", "CriserverPodStartSlow",
        "CriserverRuntimeFailing", "CriserverImagePullsFailing", "CriserverShimsLost", "CriserverLogRecordsDropped",
    )  # fmt: skip
    # A record that does not fit into what the database has in reserve.
    large = {"large": "x" * 200_000}
    with filled(node.root):
        nodes.again(lambda: nodes.host_pod(node, annotations=large), "CriserverDatabaseWritesFailing", pause=0.2)


# The node "slow"


@cause("slow", "CriserverDatabaseSlow")
def the_disk_stands_still_again_and_again(nodes: AlertNodes, node: Node) -> None:
    def stand_still() -> None:
        with frozen(node.root):
            config = node.pod(f"pod{next(nodes.numbers)}", linux=HOST_NETWORK)
            begun = node.client.RunPodSandbox.begin(config=config)
            time.sleep(1.8)
        node.pods.add(begun.result().pod_sandbox_id)

    nodes.again(stand_still, "CriserverDatabaseSlow", pause=0)


@cause("slow", "CriserverDescriptorsRunOut")
def many_clients_connect(nodes: AlertNodes, node: Node) -> None:
    assert node.process is not None
    usual = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (300, usual[1]))
    with contextlib.ExitStack() as clients:
        for _ in range(len(node.descriptors()), 260):
            clients.enter_context(socket.socket(socket.AF_UNIX)).connect(node.socket)
        nodes.again(lambda: None, "CriserverDescriptorsRunOut")
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, usual)


# The node "ending"


@cause("ending", "CriserverEventLoopSlow")
def the_daemon_gets_no_processor(nodes: AlertNodes, node: Node) -> None:
    process = node.process
    assert process is not None

    def stop() -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        process.send_signal(signal.SIGCONT)

    nodes.again(stop, "CriserverEventLoopSlow")


@cause("ending", "CriserverRecoveryFailed")
def a_pod_that_was_cut_off_cannot_be_undone(nodes: AlertNodes, node: Node) -> None:
    nodes.fired("CriserverEventLoopSlow")
    Path(node.base, "hangs").touch()
    making = node.client.RunPodSandbox.begin(config=node.pod("cut"))
    eventually(Path(node.base, "adding").exists)
    node.kill()
    assert making.exception() is not None
    os.unlink(f"{node.base}/hangs")
    node.start()
    nodes.again(lambda: None, "CriserverRecoveryFailed", kind="sandbox")


@cause("ending", "CriserverRestarting")
def the_daemon_is_killed_again_and_again(nodes: AlertNodes, node: Node) -> None:
    nodes.fired("CriserverRecoveryFailed")
    begun = f'process_start_time_seconds{{instance="{nodes.addresses["ending"]}"}}'

    def restart() -> None:
        before = nodes.prometheus.value(begun)
        node.kill()
        node.start()
        eventually(lambda: nodes.prometheus.value(begun) not in (before, None))

    nodes.again(restart, "CriserverRestarting", pause=0)


@cause("ending", "CriserverDown")
def the_daemon_does_not_run(nodes: AlertNodes, node: Node) -> None:
    nodes.fired("CriserverRestarting")
    Path(node.base, "undoable").touch()
    node.remove_pods()
    node.stop()
    nodes.again(lambda: None, "CriserverDown")


@pytest.fixture(scope="module")
def nodes(nothing_left: None, busybox_archive: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AlertNodes]:
    """The nodes, on which no alert fires yet."""
    with scraped(busybox_archive, tmp_path_factory.mktemp("prometheus")) as nodes:
        assert nodes.fired_ever() == set()
        yield nodes


@pytest.fixture(scope="module")
def causes(nodes: AlertNodes) -> Iterator[dict[str, Future[None]]]:
    """All causes, which are being made."""
    with ThreadPoolExecutor(len(CAUSES)) as pool:
        for alert, cause in CAUSES.items():
            nodes.causes[alert] = pool.submit(cause.make, nodes, nodes.all[cause.node])
        yield nodes.causes


@pytest.mark.parametrize("alert", CAUSES)
def test_an_alert_fires_by_its_cause(alert: str, nodes: AlertNodes, causes: dict[str, Future[None]]) -> None:
    causes[alert].result()


def test_no_alert_fires_where_its_cause_is_not(nodes: AlertNodes, causes: dict[str, Future[None]]) -> None:
    wait(causes.values())
    expected = {(alert, nodes.addresses[cause.node]) for alert, cause in CAUSES.items() if alert not in OF_TIME}
    assert nodes.fired_ever() == expected


def test_each_rule_can_be_evaluated(nodes: AlertNodes, causes: dict[str, Future[None]]) -> None:
    """And each recording rule has given values."""
    wait(causes.values())
    rules = [rule for group in nodes.prometheus.asked("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert len(recorded) > 4
    assert [name for name in recorded if not nodes.prometheus.value(f"count_over_time({name}[10m])")] == []
