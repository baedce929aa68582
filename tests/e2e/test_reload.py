"""SIGHUP and SIGUSR1: a running daemon takes over its configuration, and logs the work under way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node, refused
from tests.support.waiting import eventually


def reload(node: Node, drop_in: str) -> list[dict[str, Any]]:
    """Write the drop-in and send SIGHUP; what the daemon logs until it has ended with that."""
    directory = Path(node.config).parent / "conf.d"
    directory.mkdir(exist_ok=True)
    (directory / "test.toml").write_text(drop_in)
    return told(node, signal.SIGHUP, "reloaded")


def told(node: Node, number: signal.Signals, last: str) -> list[dict[str, Any]]:
    """Send a signal to the daemon; the lines of its log until there is one with this word in its event."""
    assert node.process is not None
    begin = len(node.daemon_log())
    os.kill(node.process.pid, number)

    def events() -> list[dict[str, Any]]:
        whole = node.daemon_log()[begin:].rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    eventually(lambda: any(last in line["event"] for line in events()))
    return events()


def test_a_handler_of_a_drop_in_is_there_after_a_reload(node: Node) -> None:
    pod = {"config": node.pod("kata"), "runtime_handler": "other"}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "handler 'other' is not configured"):
        node.client.RunPodSandbox(**pod)
    network = '[cni]\nconf_dir = "/elsewhere"\ntimeout = 7\n'
    lines = reload(node, f'[runtimes.other]\npath = "runc"\n{network}[images]\nmax_seconds = 7200\n')
    assert {line["key"]: line["event"] for line in lines if "key" in line} == {
        "runtimes.other.path": "configuration changed",
        "cni.timeout": "configuration changed",
        "images.max_seconds": "configuration changed",
        "cni.conf_dir": "a configuration change waits for a restart",
    }
    sandbox = node.client.RunPodSandbox(**pod).pod_sandbox_id
    node.pods.add(sandbox)
    handlers = {handler.name for handler in node.client.Status().runtime_handlers}
    assert {"", "other"} <= handlers
    assert node.client.PodSandboxStatus(pod_sandbox_id=sandbox).status.state == cri.SANDBOX_READY
    # A handler that is not configured any more still ends its pods.
    reload(node, "")
    node.remove_pods()
    assert node.settled() == []


def test_a_wrong_configuration_is_told_and_not_used(node: Node) -> None:
    (line,) = reload(node, "[cni]\ntimeout = 0\n")
    assert line["level"] == "error"
    assert "conf.d/test.toml: cni.timeout = 0" in line["error"]
    (line,) = reload(node, "")
    assert (line["event"], line["changed"]) == ("configuration reloaded", 0)


def test_the_work_under_way_goes_to_the_log(node: Node) -> None:
    lines = told(node, signal.SIGUSR1, "work under way")
    tasks = {line["task"]: line["at"] for line in lines if "at" in line and "task" in line}
    assert tasks["the sync of new images"][0].startswith("criserver/upkeep.py:")
    assert tasks["the reload"][-1].endswith("Event.wait")
    assert any("MainThread" in line.get("thread", "") for line in lines)
    node.client.Version()
