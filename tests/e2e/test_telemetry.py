"""The daemon's metrics over the life of a pod, by value."""

from __future__ import annotations

import platform
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from criserver import __version__
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.node import Node, refused
from tests.support.prometheus import scraping
from tests.support.registry import free_port
from tests.support.waiting import eventually


class Scrapes:
    """Scrapes of a node's metrics."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def all(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample, by its name and its labels."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            families = text_string_to_metric_families(answer.read().decode())
            return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 for one that is not there yet."""
        return self.all().get((f"criserver_{name}", frozenset(labels.items())), 0)


@pytest.fixture(scope="module")
def scrapes() -> Scrapes:
    return Scrapes(free_port())


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, scrapes: Scrapes) -> Iterator[Node]:
    node = Node()
    try:
        with open(node.config, "a") as f:
            f.write(f'[metrics]\naddress = "{scrapes.address}"\n')
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        node.close()


def test_the_life_of_a_pod(node: Node, scrapes: Scrapes) -> None:
    value = scrapes.value
    eventually(lambda: value("build_info", version=__version__, python_version=platform.python_version()))
    assert value("images") == 1
    assert value("image_layers_unpacked_total") == 1
    assert value("image_disk_bytes") > 1 << 20
    assert value("sandboxes", state="ready") == 0

    pod = node.run_pod()
    assert value("sandboxes", state="ready") == 1
    assert value("cni_operation_duration_seconds_count", plugin="bridge", verb="ADD") == 1
    assert value("cni_operation_duration_seconds_sum", plugin="bridge", verb="ADD") > 0
    assert value("rpcs_total", service="RuntimeService", method="RunPodSandbox", code="OK") == 1
    assert value("rpc_duration_seconds_count", service="RuntimeService", method="RunPodSandbox") == 1

    container = node.create(pod, "c", ["sleep", "1000"])
    assert value("containers", state="created") == 1
    node.client.StartContainer(container_id=container)
    assert value("containers", state="running") == 1
    assert value("shims") == 1
    assert value("shims_lost") == 0
    assert value("oci_runtime_call_duration_seconds_count", handler="runc", verb="run") == 1
    assert node.sh(container, "echo x") == "x\n"
    assert value("execs_total") == 1
    assert value("execs_running") == 0

    node.client.StopContainer(container_id=container, timeout=0)
    assert value("containers", state="running") == 0
    assert value("containers", state="exited") == 1
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        node.client.ExecSync(container_id=container, cmd=["true"])
    assert value("rpcs_total", service="RuntimeService", method="ExecSync", code="FAILED_PRECONDITION") == 1
    assert value("rpcs_in_flight", service="RuntimeService", method="ExecSync") == 0

    node.client.StopPodSandbox(pod_sandbox_id=pod)
    assert value("cni_operation_duration_seconds_count", plugin="bridge", verb="DEL") == 1
    assert value("cni_operation_failures_total", plugin="bridge", verb="DEL") == 0
    assert value("sandboxes", state="not_ready") == 1
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    eventually(lambda: value("shims") == 0)
    assert value("shims_lost") == 0
    assert value("sandboxes", state="not_ready") == 0
    assert value("database_write_duration_seconds_count") > 5
    assert value("database_write_failures_total") == 0


def test_streams_and_calls_under_way(node: Node, scrapes: Scrapes) -> None:
    events = node.client.GetContainerEvents(deadline=120)
    labels = {"service": "RuntimeService", "method": "GetContainerEvents"}
    eventually(lambda: scrapes.value("rpcs_in_flight", **labels) == 1)
    events.cancel()
    eventually(lambda: scrapes.value("rpcs_in_flight", **labels) == 0)
    assert scrapes.value("rpcs_total", **labels, code="CANCELLED") == 1


def test_a_failed_pull_and_a_failed_start(node: Node, scrapes: Scrapes) -> None:
    dead = f"127.0.0.1:{free_port()}"
    with pytest.raises(grpc.RpcError):
        node.client.PullImage(image=cri.ImageSpec(image=f"{dead}/a:latest"))
    assert scrapes.value("image_pulls_total", registry=dead, result="failed") == 1
    pod = node.run_pod()
    with pytest.raises(grpc.RpcError):
        node.run(pod, "c", ["/no-such-program"])
    assert scrapes.value("oci_runtime_call_failures_total", handler="runc", verb="run") == 1
    assert scrapes.value("containers", state="exited") == 1


def test_recovery_at_the_start_and_the_process(node: Node, scrapes: Scrapes) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    node.kill()
    node.start()
    eventually(lambda: scrapes.value("recovery_records_total", kind="container", outcome="found") == 1)
    assert scrapes.value("recovery_records_total", kind="sandbox", outcome="found") == 1
    assert scrapes.value("recovery_records_total", kind="container", outcome="failed") == 0
    assert scrapes.value("shims_lost") == 0
    assert scrapes.value("recovery_duration_seconds") > 0
    assert scrapes.value("shims") == 1
    assert scrapes.value("containers", state="running") == 1
    eventually(lambda: scrapes.value("event_loop_lag_seconds_count") > 0)
    assert scrapes.value("threads") > 0
    assert scrapes.value("asyncio_tasks") > 0
    assert scrapes.all()["process_open_fds", frozenset()] > 5
    node.client.StopContainer(container_id=container, timeout=0)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
def test_a_prometheus_scrapes_the_node_and_an_alert_fires(node: Node, scrapes: Scrapes, tmp_path: Path) -> None:
    rules = Path(__file__).parents[2] / "contrib/prometheus/criserver.rules.yml"
    node.run(node.run_pod(), "c", ["sleep", "1000"])
    with scraping(scrapes.address, tmp_path, [str(rules)]) as prometheus:
        try:
            eventually(lambda: prometheus.value('criserver_sandboxes{state="ready"}') == "1")
            eventually(lambda: prometheus.value("instance:criserver_event_loop_lag_seconds:p99_rate5m"))
            groups = prometheus.asked("rules")["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
            node.stop()
            eventually(
                lambda: "CriserverDown" in {a["labels"]["alertname"] for a in prometheus.asked("alerts")["alerts"]}
            )
        finally:
            node.start()
