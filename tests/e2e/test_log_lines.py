"""The lines of the daemon's log: all of a pod's have its name, and a failure is one line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node, refused
from tests.support.waiting import eventually


def lines_with(node: Node, words: str, begin: int = 0) -> list[dict[str, Any]]:
    whole = node.daemon_log()[begin:].rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if words in line]


def test_the_lines_of_a_pods_life_have_its_name_and_how_long_it_took(node: Node) -> None:
    pod = node.run_pod("web-1")
    container = node.run(pod, "server", ["sleep", "1000"])
    os.kill(node.pid(container), signal.SIGKILL)
    eventually(lambda: any(line["event"] == "container exited" for line in lines_with(node, "web-1")))
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    told = {line["event"]: line for line in lines_with(node, "/web-1")}
    for event in ("pod sandbox runs", "container created", "container started", "pod sandbox removed"):
        assert told[event]["seconds"] > 0, event
        assert told[event]["sandbox"] == pod
        assert told[event]["rpc"]
        assert told[event]["call"] > 0
    exited = told["container exited"]
    assert (exited["container"], exited["name"], exited["code"]) == (container, "server", 137)
    # No call made it exit.
    assert "rpc" not in exited


def test_a_failure_is_one_line_with_the_cause(node: Node) -> None:
    (config,) = Path(node.cni).iterdir()
    network = config.read_text()
    begin = len(node.daemon_log())
    config.write_text(network.replace('"bridge"', '"no-such-plugin"', 1))
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "no-such-plugin"):
            node.run_pod("web-2")
    finally:
        config.write_text(network)
    (line,) = [line for line in lines_with(node, "web-2", begin) if line["level"] != "debug"]
    assert (line["event"], line["level"], line["rpc"]) == ("call failed", "warning", "RunPodSandbox")
    assert line["pod"].endswith("/web-2")
    assert "no-such-plugin" in line["error"]
    assert line["sandbox"]
    assert "exception" not in line


def test_a_container_that_cannot_start_is_named(node: Node) -> None:
    pod = node.run_pod("web-3")
    created = node.client.CreateContainer(
        pod_sandbox_id=pod,
        config=cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="broken"),
            image=cri.ImageSpec(image="localhost/busybox:latest"),
            command=["/no-such-program"],
        ),
    )
    with pytest.raises(grpc.RpcError):
        node.client.StartContainer(container_id=created.container_id)
    failed = [line for line in lines_with(node, "/web-3") if line["level"] == "warning"]
    assert {line["event"] for line in failed} == {"container not started", "call failed"}
    for line in failed:
        assert (line["container"], line["name"]) == (created.container_id, "broken")
        assert "no-such-program" in line["error"]


def test_an_idle_daemon_logs_nothing(node: Node) -> None:
    lines = node.daemon_log().count("\n")
    for _ in range(5):
        node.client.Status()
        node.client.ListPodSandbox()
    assert [line for line in node.daemon_log().splitlines()[lines:] if '"debug"' not in line] == []
