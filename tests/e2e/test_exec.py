"""Streaming exec: what kubectl exec does with the streams of a command, over both transports."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import struct
import threading
import time
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node, refused, rss
from tests.support.streaming_client import Refused, Spdy, WebSocket
from tests.support.waiting import eventually, within

SUCCESS = {"status": "Success"}


@pytest.fixture
def container(node: Node) -> str:
    return node.run(node.run_pod(), "c", ["sleep", "1000"])


def url(node: Node, container: str, *command: str, **wanted: bool) -> str:
    return node.client.Exec(container_id=container, cmd=command, **wanted).url


def outputs(node: Node, container: str, *command: str) -> str:
    return url(node, container, *command, stdout=True, stderr=True)


def exit_code(status: dict[str, Any]) -> str:
    assert status["reason"] == "NonZeroExitCode"
    (cause,) = status["details"]["causes"]
    assert cause["reason"] == "ExitCode"
    return cause["message"]


def processes(node: Node, container: str, word: str) -> list[str]:
    return [line for line in node.sh(container, "ps -o args").splitlines() if word in line]


def test_output_errors_and_success_over_spdy(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "sh", "-c", "echo out; echo err >&2"))
    client.open_command("error", "stdout", "stderr")
    assert client.finish() == SUCCESS
    assert (bytes(client.got["stdout"]), bytes(client.got["stderr"])) == (b"out\n", b"err\n")
    assert client.ended == {"error", "stdout", "stderr"}
    assert client.gone


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
def test_output_errors_and_success_over_websocket(node: Node, container: str, protocol: str) -> None:
    client = WebSocket(outputs(node, container, "sh", "-c", "echo out; echo err >&2"), protocol)
    assert client.finish() == SUCCESS
    assert (bytes(client.got[1]), bytes(client.got[2])) == (b"out\n", b"err\n")
    assert client.closed is not None
    assert client.closed.code == 1000


def test_the_exit_code_is_told(node: Node, container: str) -> None:
    spdy = Spdy(outputs(node, container, "sh", "-c", "exit 7")).open_command("error", "stdout", "stderr")
    assert exit_code(spdy.finish()) == "7"
    assert exit_code(WebSocket(outputs(node, container, "sh", "-c", "kill -9 $$")).finish()) == "137"


@pytest.mark.parametrize("protocol", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
def test_old_clients_are_told_in_words(node: Node, container: str, protocol: str) -> None:
    client = Spdy(outputs(node, container, "sh", "-c", "exit 7"), protocol).open_command("error", "stdout", "stderr")
    while client.read():
        pass
    assert client.got["error"] == b"command terminated with non-zero exit code: 7"
    client = Spdy(outputs(node, container, "true"), protocol).open_command("error", "stdout", "stderr")
    while client.read():
        pass
    assert client.got["error"] == b""


def test_a_command_that_is_not_there(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "nosuch")).open_command("error", "stdout", "stderr")
    status = client.finish()
    assert status["status"] == "Failure"
    assert "'nosuch' cannot be run" in status["message"]
    assert "not found" in status["message"]


def test_standard_input_until_its_end(node: Node, container: str) -> None:
    address = url(node, container, "sh", "-c", "cat; echo over", stdin=True, stdout=True)
    client = Spdy(address).open_command("error", "stdin", "stdout")
    client.send("stdin", b"one\n")
    client.until("stdout", b"one\n")
    client.send("stdin", b"two\n", end=True)
    assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"one\ntwo\nover\n"


def test_standard_input_until_its_end_over_websocket(node: Node, container: str) -> None:
    client = WebSocket(url(node, container, "sh", "-c", "cat; echo over", stdin=True, stdout=True))
    client.send(0, b"one\n")
    client.until(1, b"one\n")
    client.end(0)
    assert client.finish() == SUCCESS
    assert client.got[1] == b"one\nover\n"


def test_a_command_that_ends_before_its_input_does(node: Node, container: str) -> None:
    client = Spdy(url(node, container, "sh", "-c", "read x; echo $x", stdin=True, stdout=True))
    client.open_command("error", "stdin", "stdout")
    client.send("stdin", b"first\n" + b"x" * 3_000_000)
    assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"first\n"


def test_a_terminal_with_its_size(node: Node, container: str) -> None:
    address = url(node, container, "sh", stdin=True, stdout=True, tty=True)
    client = Spdy(address).open_command("error", "stdin", "stdout", "resize")
    client.send("resize", b'{"Width":123,"Height":45}\n')
    client.send("stdin", b"tty; stty size; echo $TERM; exit 3\n")
    assert exit_code(client.finish()) == "3"
    assert b"/dev/pts/0\r\n" in client.got["stdout"]
    assert b"\r\nxterm\r\n" in client.got["stdout"]
    assert b"45 123\r\n" in client.got["stdout"]


def test_what_a_short_command_says_on_a_terminal_is_not_lost_by_a_busy_daemon(node: Node, container: str) -> None:
    """A daemon that was stopped gets the terminal and the command's end at the same moment."""
    assert node.process is not None
    for delay in (0.005, 0.01, 0.015, 0.02):
        client = Spdy(url(node, container, "echo", "short", stdout=True, tty=True))
        client.open_command("error", "stdout", "resize")
        time.sleep(delay)
        node.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        node.process.send_signal(signal.SIGCONT)
        assert client.finish() == SUCCESS
        assert client.got["stdout"] == b"short\r\n", delay


def test_a_client_that_goes_while_its_terminal_is_made(node: Node, container: str) -> None:
    before = node.streams()
    for delay in (0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04):
        client = Spdy(url(node, container, "sleep", "4321", stdout=True, tty=True))
        client.open_command("error", "stdout", "resize")
        time.sleep(delay)
        client.close()
    eventually(lambda: not processes(node, container, "4321"))
    eventually(lambda: node.streams() <= before)
    # None of the descriptors that they had is still being waited for.
    for _ in range(10):
        client = Spdy(url(node, container, "echo", "here", stdout=True, tty=True))
        assert client.open_command("error", "stdout", "resize").finish() == SUCCESS
        assert client.got["stdout"] == b"here\r\n"
    assert "never retrieved" not in node.daemon_log()
    assert "was destroyed but it is pending" not in node.daemon_log()


def test_a_terminal_that_is_resized_while_a_program_runs(node: Node, container: str) -> None:
    script = "trap 'stty size' WINCH; echo ready; while true; do sleep 0.05; done"
    client = WebSocket(url(node, container, "sh", "-c", script, stdin=True, stdout=True, tty=True))
    client.until(1, b"ready")
    client.send(4, b'{"Width":100,"Height":30}')
    client.until(1, b"30 100")
    client.send(4, b'{"Width":80,"Height":24}')
    client.until(1, b"24 80")
    client.close()
    eventually(lambda: not processes(node, container, "trap"))


def test_a_resize_flood_hurts_nobody(node: Node, container: str) -> None:
    client = Spdy(url(node, container, "sh", stdin=True, stdout=True, tty=True))
    client.open_command("error", "stdin", "stdout", "resize")
    for width in range(1, 20000):
        client.send("resize", b'{"Width":%d,"Height":9}' % width)
    client.send("resize", b"not a size")
    client.send("stdin", b"stty size; exit\n")
    assert client.finish() == SUCCESS
    assert b"9 19999" in client.got["stdout"]


def test_a_client_that_goes_ends_its_command(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "sh", "-c", "echo here; sleep 4321")).open_command(
        "error", "stdout", "stderr"
    )
    client.until("stdout", b"here")
    client.close()
    eventually(lambda: not processes(node, container, "4321"))
    assert "never retrieved" not in node.daemon_log()


def test_a_client_that_goes_while_its_input_is_stuck_ends_its_command(node: Node, container: str) -> None:
    client = WebSocket(url(node, container, "sleep", "4321", stdin=True, stdout=True))
    client.sock.settimeout(2)
    with pytest.raises(TimeoutError):
        while True:
            client.send(0, b"x" * 100_000)
    # As a client's kernel does that has something unread: an orderly end would wait behind what is not taken.
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    eventually(lambda: not processes(node, container, "4321"))


def test_a_process_left_in_the_background_does_not_hold_up_the_end(node: Node, container: str) -> None:
    command = ("sh", "-c", "sleep 999 & echo done")
    with within(20):
        client = Spdy(outputs(node, container, *command)).open_command("error", "stdout", "stderr")
        assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"done\n"


def test_a_slow_client_gets_all_of_the_output(node: Node, container: str) -> None:
    """It ends long before its output is taken; nothing of it is lost, and little of it is in memory."""
    script = "dd if=/dev/zero bs=1000000 count=40 2>/dev/null | tr '\\0' x"
    assert Spdy(outputs(node, container, "true")).open_command("error", "stdout", "stderr").finish() == SUCCESS
    assert node.process is not None
    before = rss(node.process.pid)
    client = Spdy(outputs(node, container, "sh", "-c", script)).open_command("error", "stdout", "stderr")
    time.sleep(3)  # a daemon that did not hold back would have all of it
    assert rss(node.process.pid) - before < 12 << 20
    assert client.finish() == SUCCESS
    assert hashlib.sha256(client.got["stdout"]).digest() == hashlib.sha256(b"x" * 40_000_000).digest()


def test_a_client_that_never_reads_costs_little_and_hinders_nobody(node: Node, container: str) -> None:
    assert Spdy(outputs(node, container, "true")).open_command("error", "stdout", "stderr").finish() == SUCCESS
    assert node.process is not None
    before = rss(node.process.pid)
    clients = [
        Spdy(outputs(node, container, "cat", "/dev/zero")).open_command("error", "stdout", "stderr") for _ in range(10)
    ]
    time.sleep(1)  # a daemon that did not hold back would have gigabytes
    assert rss(node.process.pid) - before < 20 << 20
    assert node.sh(container, "echo fine") == "fine\n"
    for client in clients:
        client.close()
    eventually(lambda: not processes(node, container, "/dev/zero"))


def test_input_and_output_at_once(node: Node, container: str) -> None:
    """50 MB through cat, in chunks that fit nothing."""
    client = Spdy(url(node, container, "cat", stdin=True, stdout=True)).open_command("error", "stdin", "stdout")
    piece, count = os.urandom(777_777), 64
    client.sock.settimeout(60)

    def feed() -> None:
        for number in range(count):
            # The connection's state is the reader's alone; frames are cut by hand here.
            size_and_end = len(piece) | (number == count - 1) << 24
            client.sock.sendall(struct.pack(">II", client.ids["stdin"], size_and_end) + piece)

    feeder = threading.Thread(target=feed)
    feeder.start()
    digest, size = hashlib.sha256(), 0
    while client.read():
        digest.update(client.got["stdout"])
        size += len(client.got["stdout"])
        client.got["stdout"].clear()
    feeder.join()
    assert size == len(piece) * count
    assert digest.digest() == hashlib.sha256(piece * count).digest()
    assert client.got["error"] == b'{"status":"Success"}'


def test_an_address_works_once(node: Node, container: str) -> None:
    address = outputs(node, container, "true")
    assert Spdy(address).open_command("error", "stdout", "stderr").finish() == SUCCESS
    with pytest.raises(Refused) as e:
        Spdy(address)
    assert e.value.status == 404
    with pytest.raises(Refused) as e:
        Spdy(address[:-4] + "xxxx")
    assert e.value.status == 404


def test_protocols_that_nobody_speaks(node: Node, container: str) -> None:
    with pytest.raises(Refused) as e:
        Spdy(outputs(node, container, "true"), "v9.channel.k8s.io")
    assert e.value.status == 403
    assert "v4.channel.k8s.io" in e.value.body


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"stdout": True, "stderr": True, "tty": True}, ["tty and stderr"]),
        ({}, ["none of stdin, stdout and stderr"]),
    ],
)
def test_streams_that_do_not_go_together(node: Node, container: str, wanted: dict[str, bool], words: list[str]) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        url(node, container, "true", **wanted)


def test_exec_in_what_is_not_there_or_does_not_run(node: Node) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "does not exist"):
        url(node, "f" * 64, "true", stdout=True)
    created = node.create(node.run_pod(), "c", ["true"])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "created, not running"):
        url(node, created, "true", stdout=True)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "command is empty"):
        node.client.Exec(container_id=created, stdout=True)


def test_a_container_that_ends_while_a_client_is_on_its_way(node: Node, container: str) -> None:
    address = outputs(node, container, "true")
    node.client.StopContainer(container_id=container, timeout=0)
    status = Spdy(address).open_command("error", "stdout", "stderr").finish()
    assert status["status"] == "Failure"
    assert "exited, not running" in status["message"]


def test_a_container_that_ends_under_a_command(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "sh", "-c", "echo here; sleep 999")).open_command(
        "error", "stdout", "stderr"
    )
    client.until("stdout", b"here")
    node.client.StopContainer(container_id=container, timeout=0)
    assert client.finish()["status"] == "Failure"


def test_unknown_and_surplus_streams_are_reset(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "echo", "hi"))
    client.open("strange", streamtype="strange")
    client.open("stdin", streamtype="stdin")
    client.open("nameless")
    client.open_command("error", "stdout", "stderr")
    assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"hi\n"
    assert set(client.reset) == {"strange", "stdin", "nameless"}


def test_garbage_after_the_upgrade_ends_only_its_connection(node: Node, container: str) -> None:
    client = Spdy(outputs(node, container, "sleep", "4321"))
    client.sock.sendall(b"\xff" * 4096)
    while client.sock.recv(65536):
        pass
    assert node.sh(container, "echo fine") == "fine\n"


def test_the_old_api_version_streams_too(node: Node, container: str) -> None:
    call = node.client.channel.unary_unary(
        "/runtime.v1alpha2.RuntimeService/Exec",
        request_serializer=cri.ExecRequest.SerializeToString,
        response_deserializer=cri.ExecResponse.FromString,
    )
    address = call(cri.ExecRequest(container_id=container, cmd=["echo", "hi"], stdout=True), timeout=30).url
    client = Spdy(address).open_command("error", "stdout")
    assert client.finish() == SUCCESS
    assert client.got["stdout"] == b"hi\n"
