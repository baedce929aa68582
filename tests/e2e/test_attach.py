"""Attach: clients at the streams of a container's own process."""

from __future__ import annotations

import os
import time

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import UNTIL_GO, Node, refused
from tests.support.streaming_client import Spdy, WebSocket
from tests.support.waiting import eventually

SUCCESS = {"status": "Success"}
ECHO = ["sh", "-c", "while read x; do echo got $x; done; echo over; sleep 1000"]


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod()


def attach(node: Node, container: str, **wanted: bool) -> str:
    return node.client.Attach(container_id=container, **wanted).url


def test_several_clients_see_the_output_from_now_on(node: Node, pod: str) -> None:
    script = "i=0; while true; do i=$((i+1)); echo tick $i; echo tock $i >&2; sleep 0.1; done"
    container = node.run(pod, "c", ["sh", "-c", script])
    eventually(lambda: "tick 2" in node.log(container))
    clients = [
        Spdy(attach(node, container, stdout=True, stderr=True)).open_command("error", "stdout", "stderr")
        for _ in range(3)
    ]
    socket = WebSocket(attach(node, container, stdout=True, stderr=True))
    for client in clients:
        client.until("stdout", b"tick")
        assert b"tick 1\n" not in client.got["stdout"]
        client.until("stderr", b"tock")
    socket.until(1, b"tick")
    socket.until(2, b"tock")
    clients.pop().close()
    seen = bytes(clients[0].got["stdout"])
    client.until("stdout", b"tick") and clients[0].until("stdout", seen + b"tick")
    node.client.StopContainer(container_id=container, timeout=0)
    for client in clients:
        assert client.finish() == SUCCESS
    assert socket.finish() == SUCCESS


def test_input_reaches_the_process_and_outlives_a_client(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ECHO, stdin=True)
    first = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    first.send("stdin", b"one\n")
    first.until("stdout", b"got one\n")
    first.send("stdin", b"", end=True)
    first.close()
    second = WebSocket(attach(node, container, stdin=True, stdout=True))
    second.send(0, b"two\n")
    second.until(1, b"got two\n")
    second.close()
    assert "over" not in node.log(container)


def test_input_that_ends_with_the_first_client(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ECHO, stdin=True, stdin_once=True)
    client = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    client.send("stdin", b"one\n", end=True)
    client.until("stdout", b"got one\nover\n")
    client.close()


def test_input_that_ends_when_the_first_client_goes(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ECHO, stdin=True, stdin_once=True)
    client = WebSocket(attach(node, container, stdin=True, stdout=True))
    client.send(0, b"one\n")
    client.until(1, b"got one")
    client.close()
    eventually(lambda: "over" in node.log(container))


def test_a_terminal(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sh"], stdin=True, tty=True)
    client = Spdy(attach(node, container, stdin=True, stdout=True, tty=True))
    client.open_command("error", "stdin", "stdout", "resize")
    client.send("resize", b'{"Width":132,"Height":43}')
    client.send("stdin", b"tty; stty size\n")
    client.until("stdout", b"43 132")
    client.close()
    again = WebSocket(attach(node, container, stdin=True, stdout=True, tty=True))
    again.send(0, b"echo still $((40+2))\n")
    again.until(1, b"still 42")
    again.send(0, b"exit 5\n")
    assert again.finish() == SUCCESS
    assert node.wait(container).exit_code == 5


def test_the_last_words_of_a_container_are_not_lost(node: Node, pod: str) -> None:
    container = node.run(
        pod, "c", ["sh", "-c", "read x; yes 0123456789 | head -c 5000000; echo; echo last"], stdin=True
    )
    client = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    client.send("stdin", b"go\n")
    assert client.finish() == SUCCESS
    assert len(client.got["stdout"]) == 5_000_001 + len("last\n")
    assert client.got["stdout"].endswith(b"last\n")


def test_attach_after_the_daemon_was_killed(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ECHO, stdin=True)
    lost = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    lost.send("stdin", b"before\n")
    lost.until("stdout", b"got before")
    node.kill()
    node.start()
    assert node.status(container).state == cri.CONTAINER_RUNNING
    client = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    client.send("stdin", b"after\n")
    client.until("stdout", b"got after\n")
    client.close()
    assert node.log(container).splitlines() == ["got before", "got after"]


def test_a_client_that_does_not_read_is_disconnected_and_told(node: Node, pod: str) -> None:
    """For ten seconds the process waits for it, as for a slow terminal."""
    container = node.run(pod, "c", ["sh", "-c", "read x; yes $x | head -c 50000000; sleep 1000"], stdin=True)
    client = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    began = time.monotonic()
    client.send("stdin", b"noise\n")
    log = node.status(container).log_path
    eventually(lambda: os.path.getsize(log) > 50_000_000, 60)
    assert time.monotonic() - began > 10
    status = client.finish()
    assert status["status"] == "Failure"
    assert "did not read its output in time" in status["message"]
    node.client.StopContainer(container_id=container, timeout=0)


@pytest.mark.parametrize("has", [False, True])
def test_a_client_that_does_not_know_whether_the_container_has_a_terminal(node: Node, pod: str, *, has: bool) -> None:
    """As `crictl attach` without --tty. A terminal has one output."""
    container = node.run(pod, "c", ECHO, stdin=True, tty=has)
    streams = ("error", "stdin", "stdout") if not has else ("error", "stdin", "stdout", "stderr")
    wanted = {"tty": True} if not has else {"stderr": True}
    client = Spdy(attach(node, container, stdin=True, stdout=True, **wanted)).open_command(*streams)
    if not has:
        client.open("resize", streamtype="resize")
    client.send("stdin", b"hello\n")
    client.until("stdout", b"got hello")
    client.close()


def test_a_client_of_input_alone(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ECHO, stdin=True)
    client = WebSocket(attach(node, container, stdin=True))
    client.send(0, b"quiet\n")
    eventually(lambda: "got quiet" in node.log(container))
    node.client.StopContainer(container_id=container, timeout=0)
    assert client.finish() == SUCCESS


def test_input_for_a_container_that_has_none(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sh", "-c", f"{UNTIL_GO}; echo end"])
    client = Spdy(attach(node, container, stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    client.send("stdin", b"x" * 1_000_000)
    node.sh(container, "touch /go")
    assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"end\n"


def test_what_is_refused(node: Node, pod: str) -> None:
    container = node.run(pod, "c", ["sleep", "1000"])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "none of stdin, stdout and stderr"):
        attach(node, container)
    node.client.StopContainer(container_id=container, timeout=0)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited, not running"):
        attach(node, container, stdout=True)
