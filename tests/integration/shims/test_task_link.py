"""Shims of containerd's kind that do not do what they should, each of which a script stands for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import processes
from tests.support.pages import ROOT
from tests.support.shimhost import Container, Host, rootfs
from tests.support.waiting import eventually

__all__ = ["rootfs"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("busybox"), reason="needs root and busybox")

# Seconds. What answers takes milliseconds, on a machine that others use too.
LIMITS = {
    "task_shim._CREATE_LIMIT": 3.0,
    "task_shim._CALL_LIMIT": 3.0,
    "task_shim._UPDATE_LIMIT": 3.0,
    "task_execs._EXEC_LIMIT": 3.0,
}

# MODE is its first argument. "start" prints where the server listens, which is a fork of it.
SHIM = f"""
import os, socket, sys, time
sys.path.insert(0, {str(ROOT)!r})
from shims import task_wire
mode, action = sys.argv[1], sys.argv[-1]
if mode == "fails":
    sys.exit("no sandbox here")
if mode == "babbles":
    print("hello")
    sys.exit()
if mode == "deaf":
    print("unix:///nowhere/socket")
    sys.exit()
listener = socket.socket(socket.AF_UNIX)
listener.bind("theirs.sock")
listener.listen()
print('{{"version":3,"protocol":"ttrpc","address":"unix:///proc/%d/cwd/theirs.sock"}}' % os.getppid(), flush=True)
if os.fork():
    sys.exit()
os.close(1)
peer, frames = listener.accept()[0], task_wire.TaskFrames()
waits = {{
    "rubbish": task_wire.data(2, b"\\xff"),
    "invents": task_wire.data(2, task_wire.number(1, 1 << 40)),
    "denies": task_wire.data(1, task_wire.number(1, 5)),
}}
waiting, child = 0, os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "1000"])
execs, late = {{}}, 0
def begin(exec_id):
    with open(execs[exec_id], "wb") as out:
        out.write(b"of " + exec_id)
while block := peer.recv(65536):
    for stream, _, message in frames.feed(block):
        request = task_wire.fields(message)
        method, refusal = task_wire.content(request, 2), b""
        waiting = stream if method == b"Wait" else waiting
        if mode == "silent" or method == b"Wait" or (mode, method) == ("stuck", b"Kill"):
            continue
        payload = task_wire.fields(task_wire.content(request, 3))
        exec_id = task_wire.content(payload, 2)
        if mode == "drowsy" and exec_id:
            with open("calls", "ab") as calls:
                seconds = task_wire.integer(request, 4) // 10**9
                calls.write(b"%s %s %d\\n" % (method, exec_id, seconds))
            if method == b"Exec":
                execs[exec_id] = task_wire.content(payload, 5)
                if late:  # the start of the first one is done now
                    begin(b"one")
                    peer.sendall(task_wire.frame(late, task_wire.RESPONSE, b""))
                    late = 0
            elif method == b"Start" and exec_id == b"one":
                late = stream
                continue
            elif method == b"Start":
                begin(exec_id)
        if mode == "slow" and method in (b"ResizePty", b"CloseIO", b"Update"):
            continue
        if (mode, method) == ("vanishes", b"Kill"):
            sys.exit()
        if method == b"Kill" and mode in waits:
            peer.sendall(task_wire.frame(waiting, task_wire.RESPONSE, waits[mode]))
            continue
        if (mode, method) == ("refuses", b"Create"):
            refusal = task_wire.number(1, 9) + task_wire.data(2, "no room in the sandbox")
        answer = task_wire.data(1, refusal) + task_wire.data(2, task_wire.number(1, child))
        peer.sendall(task_wire.frame(stream, task_wire.RESPONSE, answer))
        if method == b"Shutdown":
            os.kill(child, 9)
            sys.exit()
"""


@pytest.fixture(scope="module")
def host(rootfs: Path) -> Iterator[Host]:
    host = Host(rootfs, limits=LIMITS)
    (host.directory / "shim.py").write_text(SHIM)
    yield host
    host.close()


def fork(host: Host, mode: str) -> Container:
    """A shim of ours, under which a script of this mode is to run the container."""
    config = host.prepare(mode, "true")
    os.rename(Path(config["bundle"]) / "config.json", Path(config["directory"]) / "config.json")
    config["bundle"] = config["directory"]
    config["runtime_command"] = []
    command = [sys.executable, str(host.directory / "shim.py"), mode]
    config["task"] = {"command": command, "namespace": "k8s.io", "options_type": "", "options": ""}
    container = host.fork(config)
    container.directory = host.directory / mode
    return container


def theirs(container: Container) -> list[int]:
    """The processes of the script."""
    return [pid for pid, words in processes() if "shim.py" in words and str(container.directory) in words]


def end(container: Container) -> None:
    """End what the daemon would find by its directory."""
    for pid, words in processes():
        if f"in {container.directory}" in words:
            with contextlib.suppress(ProcessLookupError):  # it may be ending by itself
                os.kill(pid, 9)


@pytest.mark.parametrize(
    ("mode", "words", "late"),
    [
        ("fails", "no sandbox here", False),
        ("babbles", "message of the shim", False),
        ("deaf", "No such file", False),
        ("refuses", "no room in the sandbox", False),
        ("silent", "did not answer Create within 3 s", True),
    ],
)
def test_a_start_that_fails_is_told_with_the_reason(host: Host, mode: str, words: str, late: bool) -> None:
    container = fork(host, mode)
    failed = container.client.expect("failed")
    assert words in failed["error"]
    assert failed["late"] is late
    # The mark is for the daemon: the runtime's program has to clean up, unless its shim has said that nothing is left.
    assert (container.directory / "state/task.json").exists() is (mode != "refuses")
    end(container)
    eventually(lambda: not theirs(container))


@pytest.mark.parametrize("mode", ["vanishes", "stuck", "rubbish", "invents", "denies"])
def test_nobody_says_how_a_container_ended_whose_shim_does_not_tell(host: Host, mode: str) -> None:
    container = fork(host, mode)
    assert container.started()["start_ticks"] > 0
    assert container.client.ask("signal", signal=15).get("ok")
    with pytest.raises(EOFError):
        container.client.expect("exited")
    assert not (container.directory / "state/exit.json").exists()
    mark: dict[str, Any] = json.loads((container.directory / "state/task.json").read_text())
    assert mark["version"] == 3
    end(container)


def test_a_side_request_that_is_not_answered_fails_alone(host: Host) -> None:
    """The container goes on, and its end is told."""
    container = fork(host, "slow")
    container.started()
    client = container.client
    assert client.ask("resize", width=80, height=24).get("ok")
    assert client.ask("close-stdin").get("ok")
    assert client.ask("update", resources={}).get("ok")
    updated = client.expect("updated")
    assert updated["late"] is True
    assert "did not answer Update within 3 s" in updated["error"]
    assert client.ask("signal", signal=15).get("ok"), "there still is a connection"
    end(container)


def test_an_exec_that_is_started_too_late_writes_into_no_other(host: Host) -> None:
    """The runtime's shim opens the streams by the numbers of our descriptors, which others may have by then."""
    container = fork(host, "drowsy")
    container.started()
    spec = container.directory / "spec.json"
    spec.write_text("{}")
    null = os.open(os.devnull, os.O_RDWR)
    readers = {}
    try:
        for name in ("one", "two"):
            readers[name], writer = os.pipe()
            ask = {"exec_id": name, "spec": str(spec), "owned": False}
            assert container.client.ask("exec", [null, writer, null], **ask).get("ok")
            os.close(writer)
            if name == "one":
                failed = container.client.expect("exec-failed")
                assert (failed["exec_id"], failed["late"]) == ("one", True)
                assert "did not answer Start within 3 s" in failed["error"]
        assert container.client.expect("exec-started")["exec"] == "two"
        for name, reader in readers.items():
            assert os.read(reader, 100) == f"of {name}".encode()
            assert os.read(reader, 100) == b""
        calls = container.directory / "state" / "calls"
        eventually(lambda: "Kill one 10" in calls.read_text().splitlines())
        assert "Kill two" not in calls.read_text()
        # The runtime's shim is told when to give up, so that nothing of an exec that hangs stays.
        assert {"Exec one 3", "Start one 3"} <= set(calls.read_text().splitlines())
    finally:
        for fd in (null, *readers.values()):
            os.close(fd)
    end(container)


def test_requests_that_are_wrong_are_refused(host: Host) -> None:
    container = fork(host, "plain")
    container.started()
    client = container.client
    for keys in ({"signal": "9"}, {"signal": -1}, {}):
        assert "whole number" in client.ask("signal", **keys)["error"]
    assert "whole number" in client.ask("resize", width=1, height="2")["error"]
    assert client.ask("resize", width=80, height=24).get("ok")
    assert client.ask("close-stdin").get("ok")
    assert client.ask("update", resources={}).get("ok")
    assert client.expect("updated") == {"event": "updated", "late": False}
    end(container)
