"""Traces: a pod's start at a collector and on the operator's terminal, and collectors that do not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criserver.cli.client import ADMIN, as_json, method
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.telemetry import otel_libraries
from tests.support.fixtures import serving
from tests.support.imagebuilder import busybox_image
from tests.support.node import RUNTIME, Node, handler
from tests.support.nri_plugin import plugged
from tests.support.registry import Registry, registry
from tests.support.waiting import SLOWNESS, eventually

if not otel_libraries.are_installed():
    pytest.skip("OpenTelemetry is not installed: pip install 'criserver[tracing]'", allow_module_level=True)

from tests.support.collector import Collector, attributes, collecting

__all__ = ["registry"]

# A kubelet's trace, and its span that calls the daemon. The last two digits say whether it is sampled.
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT}-00"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str, collector: Collector) -> Iterator[Node]:
    tables = f'{handler("runc", RUNTIME)}[tracing]\nendpoint = "{collector.address}"\n'
    with serving(busybox_archive, tables) as node:
        yield node


def traced(node: Node, *arguments: str, code: int = 0) -> str:
    words = [sys.executable, "-m", "criserver", "--config", node.config, "trace", *arguments]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60 * SLOWNESS)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def calls(node: Node, subject: str = "") -> list[dict[str, Any]]:
    """As ``criserver trace --json`` prints them."""
    answer = method(node.client.channel, ADMIN, "Trace")(admin.TraceRequest(subject=subject))
    return [as_json(call) for call in answer.calls]


def log_lines(node: Node) -> list[dict[str, Any]]:
    """The whole lines of the daemon's log."""
    return [json.loads(line) for line in node.daemon_log().rpartition("\n")[0].splitlines()]


def names(call: dict[str, Any]) -> list[str]:
    return [part["name"] for part in call["parts"]]


def test_a_pods_start_is_one_trace_below_the_kubelets_span(
    node: Node, collector: Collector, registry: Registry
) -> None:
    headers = {"traceparent": SAMPLED}
    image = registry.push(busybox_image(layers=[{"a": b"1"}]), "traced:1")
    pod = node.pod("web")
    with plugged(f"{node.base}/nri/nri.sock", name="watcher"):
        node.client.PullImage(image=cri.ImageSpec(image=image), sandbox_config=pod, headers=headers)
        sandbox = node.client.RunPodSandbox(config=pod, headers=headers).pod_sandbox_id
        node.pods.add(sandbox)
        container = node.create(sandbox, "main", ["sleep", "1000"], image=image, headers=headers)
        node.client.StartContainer(container_id=container, headers=headers)
    service = "runtime.v1.RuntimeService"
    eventually(lambda: any(s.name.endswith("/StartContainer") for s in collector.of(TRACE)))
    spans = {span.span_id: span for span in collector.of(TRACE)}
    by_name = {span.name: span for span in spans.values()}
    roots = {span.name for span in spans.values() if span.parent_span_id.hex() == PARENT}
    assert roots == {
        "runtime.v1.ImageService/PullImage",
        *(f"{service}/{rpc}" for rpc in ("RunPodSandbox", "CreateContainer", "StartContainer")),
    }

    def way(name: str) -> list[str]:
        """The names from a span up to its call."""
        found = [name]
        while (above := spans.get(by_name[found[-1]].parent_span_id)) is not None:
            found.append(above.name)
        return found

    run, create, start = (f"{service}/{rpc}" for rpc in ("RunPodSandbox", "CreateContainer", "StartContainer"))
    assert way("CNI bridge ADD") == ["CNI bridge ADD", run]
    assert way("CNI portmap ADD") == ["CNI portmap ADD", run]
    assert way("namespaces") == ["namespaces", run]
    assert way("NRI 10-watcher RunPodSandbox") == ["NRI 10-watcher RunPodSandbox", run]
    assert way("mount") == ["mount", create]
    assert way("snapshot") == ["snapshot", create]
    assert way("shim") == ["shim", "OCI runc run", start]
    pull = f"pull {registry.address}"
    assert way("unpack") == ["unpack", pull, "runtime.v1.ImageService/PullImage"]
    downloads = {attributes(s)["criserver.blob"] for s in spans.values() if s.name == "download"}
    assert len(downloads) == 2  # the configuration and a layer; the layer of busybox is here already
    # What a span is about, and that it is within its parent.
    about = attributes(by_name[start])
    assert about["k8s.pod.name"] == "web"
    assert about["k8s.namespace.name"] == "e2e"
    assert about["k8s.container.name"] == "main"
    assert about["container.id"] == container
    assert about["rpc.response.status_code"] == "OK"
    for span in spans.values():
        if span.parent_span_id in spans:
            above = spans[span.parent_span_id]
            assert above.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert {collector.service(span) for span in spans.values()} == {"criserver"}
    # The lines of the log name the trace, beside the number of their call.
    told = [line for line in log_lines(node) if line.get("trace_id") == TRACE]
    assert {"pod sandbox runs", "container created", "container started"} <= {line["event"] for line in told}
    assert {line["rpc"] for line in told} == {"PullImage", "RunPodSandbox", "CreateContainer", "StartContainer"}
    assert len({line["call"] for line in told}) == 4


def test_a_callers_decision_and_the_rate_say_what_is_sent(node: Node, collector: Collector) -> None:
    node.client.Version(headers={"traceparent": UNSAMPLED})
    node.client.Version()
    # A wrong header is as none.
    node.client.Version(headers={"traceparent": "00-zz-1-01"})
    other = TRACE.replace("4", "5")
    node.client.Version(headers={"traceparent": f"00-{other}-{PARENT}-01"})
    (span,) = eventually(lambda: collector.of(other))
    assert {line["trace_id"] for line in log_lines(node) if "trace_id" in line} == {TRACE, other}
    assert span.name == "runtime.v1.RuntimeService/Version"
    # What was sent earlier has come earlier: the queue keeps the order.
    assert collector.of(TRACE[::-1]) == []
    assert {s.name.rpartition("/")[2] for s in collector.all() if not s.parent_span_id} == set()
    # The rate can be changed while the daemon runs, and the endpoint cannot.
    drop_in = Path(node.config).parent / "conf.d" / "test.toml"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text('[tracing]\nsampling_rate_per_million = 1000000\nendpoint = "127.0.0.1:1"\n')
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGHUP)
    eventually(lambda: "configuration reloaded" in node.daemon_log())
    lines = [json.loads(line) for line in node.daemon_log().splitlines() if '"key": "tracing.' in line]
    assert {line["key"]: line["event"] for line in lines} == {
        "tracing.sampling_rate_per_million": "configuration changed",
        "tracing.endpoint": "a configuration change waits for a restart",
    }
    node.client.Version()
    (span,) = eventually(lambda: [s for s in collector.all() if not s.parent_span_id])
    assert span.name.endswith("/Version")
    assert [line["rpc"] for line in log_lines(node) if line.get("trace_id") == span.trace_id.hex()] == ["Version"]
    drop_in.unlink()


def test_the_timeline_of_a_pod_on_the_terminal(node: Node) -> None:
    pod = node.run_pod("web")
    container = node.run(pod, "main", ["sleep", "1000"])
    node.client.StopContainer(container_id=container, timeout=0)
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    found = calls(node, pod[:12])
    assert [call["rpc"] for call in found] == [
        "RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "StopPodSandbox", "RemovePodSandbox",
    ]  # fmt: skip
    assert all(call["about"]["pod"] == "e2e/web" and call["code"] == "OK" and not call["underWay"] for call in found)
    parts = {call["rpc"]: names(call) for call in found}
    assert {"namespaces", "CNI bridge ADD", "CNI portmap ADD"} <= set(parts["RunPodSandbox"])
    assert {"snapshot", "mount", "bundle"} <= set(parts["CreateContainer"])
    assert f"OCI {RUNTIME} run" in parts["StartContainer"]
    assert "SIGKILL" in parts["StopContainer"]
    assert "CNI bridge DEL" in parts["StopPodSandbox"]
    for call in found:
        for part in call["parts"]:
            assert 0 <= part["began"] <= part["began"] + part["seconds"]
    text = traced(node, pod[:12])
    line = next(line for line in text.splitlines() if "CNI bridge ADD" in line)
    assert " ms " in line
    assert line.endswith("=")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    # A container alone, and a name. A pod that was never there.
    assert {call["rpc"] for call in calls(node, container)} == {"CreateContainer", "StartContainer", "StopContainer"}
    assert len(calls(node, "e2e/web")) >= 6
    assert json.loads(traced(node, pod, "--json")) == calls(node, pod)
    assert "StartContainer" in traced(node)
    assert "no call for e2e/none is kept" in traced(node, "e2e/none", code=1)


def test_the_layers_of_an_operators_pull(node: Node, registry: Registry) -> None:
    image = registry.push(busybox_image(layers=[{"b": b"1"}, {"c": b"2"}]), "pulled:1")
    pull = [sys.executable, "-m", "criserver", "--config", node.config, "image", "pull", image]
    subprocess.run(pull, check=True, capture_output=True, timeout=60 * SLOWNESS)
    (call,) = calls(node, image)
    assert (call["rpc"], call["code"], call["about"], call["underWay"]) == (
        "PullImage",
        "OK",
        {"reference": image},
        False,
    )
    parts = [name.split()[0] for name in names(call)]
    # The configuration and two layers are downloaded; the layer of busybox is here already.
    assert (parts.count("download"), parts.count("unpack")) == (3, 3)
    (whole,) = (part for part in call["parts"] if part["name"] == f"pull {registry.address}")
    assert 0 < whole["seconds"] <= call["seconds"]
    done = [line for line in log_lines(node) if line["event"] == "image pulled" and line["reference"] == image]
    assert [(line["rpc"], line["call"]) for line in done] == [("PullImage", call["number"])]
    assert "download" in traced(node, image)


def test_a_failed_and_a_hanging_plugin_are_seen_in_the_timeline(node: Node) -> None:
    os.makedirs(f"{node.base}/bin", exist_ok=True)
    plugin, gate = f"{node.base}/bin/gated", f"{node.base}/gate"
    with open(plugin, "w") as f:
        f.write(f'#!/bin/sh\ncat >/dev/null\n[ "$CNI_COMMAND" = ADD ] || exit 0\ncat {gate}\nexit 1\n')
    os.chmod(plugin, 0o755)
    os.mkfifo(gate)
    config = {"cniVersion": "1.0.0", "name": "gated", "plugins": [{"type": "gated"}]}
    with open(f"{node.cni}/00-gated.conflist", "w") as f:
        json.dump(config, f)
    try:
        call = subprocess.Popen([sys.executable, "-c", RUN_POD, node.socket], stdout=subprocess.PIPE, text=True)

        def under_way() -> list[dict[str, Any]]:
            return [c for c in calls(node) if c["underWay"] and "CNI gated ADD" in names(c)]

        (seen,) = eventually(under_way)
        assert [p["underWay"] for p in seen["parts"] if p["name"] == "CNI gated ADD"] == [True]
        with open(gate, "w") as f:
            f.write('{"code": 101, "msg": "no address is left"}')
        assert call.communicate(timeout=60 * SLOWNESS)[0].strip() == "refused"
        failed = calls(node, "e2e/gated")[-1]
        assert (failed["code"], failed["underWay"]) == ("INTERNAL", False)
        (part,) = (p for p in failed["parts"] if p["name"] == "CNI gated ADD")
        assert "no address is left" in part["error"]
        assert "failed: " in traced(node, "e2e/gated")
    finally:
        os.unlink(f"{node.cni}/00-gated.conflist")
        os.unlink(gate)
        os.unlink(plugin)


RUN_POD = """
import sys, grpc
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Client
metadata = cri.PodSandboxMetadata(name="gated", namespace="e2e", uid="u")
namespaces = cri.NamespaceOption(pid=cri.CONTAINER)
linux = cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces))
try:
    Client(sys.argv[1]).RunPodSandbox(config=cri.PodSandboxConfig(metadata=metadata, linux=linux))
except grpc.RpcError:
    print("refused")
"""


def test_a_collector_that_hangs_or_is_gone_delays_nothing(node: Node, collector: Collector) -> None:
    headers = {"traceparent": SAMPLED}
    collector.asked.clear()
    collector.hold.clear()
    try:
        node.client.Version(headers=headers)
        assert collector.asked.wait(30 * SLOWNESS)
        # The export has its request and no answer. More calls than the SDK's queue has room for are answered.
        for _ in range(2100):
            node.client.Version(headers=headers)
        node.run(node.run_pod("web"), "main", ["true"])
        node.remove_pods()
        assert node.stop() == 0
    finally:
        collector.hold.set()
    collector.close()
    node.start()
    node.client.Version(headers=headers)
    eventually(lambda: "traces do not reach the collector" in node.daemon_log())
    node.run(node.run_pod("web"), "main", ["true"])


def test_tracing_without_its_libraries_is_an_error_that_says_what_to_install(node: Node) -> None:
    # As in an environment without the extra: the package cannot be imported.
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from criserver.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    config = f"{node.base}/other.toml"
    with open(config, "w") as f:
        f.write(f'root = "{node.base}/r"\nstate = "{node.base}/s"\n[grpc]\naddress = "{node.base}/other.sock"\n')
        f.write('[tracing]\nendpoint = "127.0.0.1:4317"\n')
    words = [sys.executable, "-c", code, "--config", config, "serve"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120 * SLOWNESS)
    assert done.returncode == 1, done
    assert "pip install 'criserver[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr
