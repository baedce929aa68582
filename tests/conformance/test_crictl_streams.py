"""crictl exec -it, attach and port-forward at a terminal, over both transports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node
from tests.support.registry import free_port
from tests.support.services import Services, fetched
from tests.support.terminal import Terminal
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.skipif(shutil.which("crictl") is None, reason="crictl is not on PATH"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real mounts, namespaces and containers"),
    pytest.mark.parametrize("transport", ["spdy", "websocket"]),
]


def command(node: Node, verb: str, transport: str, *arguments: str) -> list[str]:
    options = ["--config", "/dev/null", "--runtime-endpoint", f"unix://{node.socket}"]
    return ["crictl", *options, verb, "--transport", transport, *arguments]


def test_exec_at_a_terminal_with_a_resize(node: Node, transport: str) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    with Terminal(command(node, "exec", transport, "-it", container, "sh")) as person:
        person.until(b"# ")
        person.type("stty size\n")
        person.until(b"30 100")
        person.resize(77, 22)
        eventually(lambda: node.sh(container, "stty size < /dev/pts/0") == "22 77\n")
        person.type("stty size\n")
        person.until(b"22 77")
        person.type("exit 0\n")
        assert person.wait() == 0


def test_exec_at_a_terminal_with_ctrl_c_and_an_exit_code(node: Node, transport: str) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    with Terminal(command(node, "exec", transport, "-it", container, "sh")) as person:
        person.until(b"# ")
        person.type("sleep 4321\n")
        eventually(lambda: "sleep 4321" in arguments(node, container))
        person.type("\x03")
        person.until(b"# ")
        person.type("echo $((6*7)) $?\n")
        person.until(b"42 130")
        person.type("exit 7\n")
        assert person.wait() != 0
        assert b"exit code 7" in person.seen


def test_a_closed_window_ends_the_exec(node: Node, transport: str) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    with Terminal(command(node, "exec", transport, "-it", container, "sh", "-c", "trap '' HUP; sleep 5432")) as person:
        eventually(lambda: "sleep 5432" in arguments(node, container))
        person.hang_up()
        person.process.wait(20)
    eventually(lambda: "sleep 5432" not in arguments(node, container))


def arguments(node: Node, container: str) -> str:
    """The command lines of all processes of a container."""
    return node.sh(container, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_exec_with_input_and_an_exit_code(node: Node, transport: str) -> None:
    container = node.run(node.run_pod(), "c", ["sleep", "1000"])
    words = command(node, "exec", transport, "-i", container, "sh", "-c", "cat; echo err >&2; exit 4")
    done = subprocess.run(words, input=b"x" * 300_000, capture_output=True, timeout=30, check=False)
    assert done.stdout == b"x" * 300_000
    assert b"err\n" in done.stderr
    assert b"exit code 4" in done.stderr
    assert done.returncode != 0


def test_attach_at_a_terminal_and_again_after_going_away(node: Node, transport: str) -> None:
    container = node.run(node.run_pod(), "c", ["sh"], stdin=True, tty=True)
    with Terminal(command(node, "attach", transport, "-it", container)) as person:
        person.type("echo $((6*7)); tty; mine=kept\n")
        person.until(b"42")
        person.until(b"/dev/pts/0")
        person.resize(77, 22)
        eventually(lambda: node.sh(container, "stty size < /dev/pts/0") == "22 77\n")
        person.hang_up()
        person.process.wait(20)
    assert node.status(container).state == cri.CONTAINER_RUNNING
    with Terminal(command(node, "attach", transport, "-it", container)) as person:
        person.type("echo still $mine\n")
        person.until(b"still kept")
        person.type("exit\n")
        assert person.wait() == 0
    assert node.wait(container).exit_code == 0


def test_port_forward(node: Node, transport: str) -> None:
    pod = node.run_pod()
    services = Services(f"{node.state}/ns/{pod}/net")
    port = free_port()
    process = subprocess.Popen(
        command(node, "port-forward", transport, pod, f"{port}:7002"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        eventually(lambda: reachable(port))
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(fetched, [port] * 20)) == [b"hello from the pod"] * 20
    finally:
        process.terminate()
        process.wait(10)
        services.close()


def reachable(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
