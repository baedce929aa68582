"""Shims with a real runc: what a container says and how it ends survives the daemon and the nursery."""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import processes
from tests.support.shimhost import CGROUP, WAIT, Container, Host, members, process_spec, rootfs
from tests.support.waiting import SLOWNESS, eventually

__all__ = ["rootfs"]

Message = dict[str, Any]

# Longer than what does not hang takes.
HASTY = 3.0 * SLOWNESS

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("runc") or not shutil.which("busybox"),
    reason="needs root, runc and busybox",
)

# Its fork takes the container's init over from runc and lets go of it only by its own end, a while after the program's.
FORKING_RUNTIME = """#!{python}
import ctypes, os, subprocess, sys, time
reader, writer = os.pipe()
if os.fork():
    os.close(writer)
    sys.exit(os.read(reader, 1)[0])
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
code = subprocess.run(["{runc}", *sys.argv[1:]]).returncode
os.write(writer, bytes([code]))
time.sleep(0.3)
os._exit(0)
"""

# Hangs in one command, with a process in a session of its own, once the real runtime has done that command.
HANGING_RUNTIME = """#!/bin/sh
case " $* " in *" {command} "*)
    {runc} "$@"
    setsid sleep {mark} &
    sleep {mark}
esac
exec {runc} "$@"
"""


@pytest.fixture
def host(rootfs: Path) -> Iterator[Host]:
    host = Host(rootfs)
    try:
        host.nursery.greeting()
        yield host
    finally:
        host.close()


def test_output_and_exit_code(host: Host) -> None:
    container = host.start("c", "sh", "-c", "echo out; echo err >&2; printf tail")
    exited = container.finished()
    assert (exited["code"], exited["oom_killed"]) == (0, False)
    assert exited["started_at"] <= exited["finished_at"]
    assert container.log("stdout") == b"out\ntail"
    assert container.log("stderr") == b"err\n"
    record = container.exit_record()
    assert record == {key: value for key, value in exited.items() if key != "event"}
    assert record.keys() == {"code", "start_ticks", "started_at", "finished_at", "oom_killed"}
    assert not (host.runtime_root / "c").exists()
    eventually(lambda: not Path(f"/proc/{container.shim}").exists())  # the nursery has reaped it


def test_started_names_the_init(host: Host) -> None:
    container = host.fork(host.prepare("c", "sleep", "1000"))
    started = container.started()
    stat = Path(f"/proc/{started['init']}/stat").read_text()
    # The OCI runtime's process has become the container's a moment after.
    eventually(lambda: Path(f"/proc/{started['init']}/comm").read_text() == "sleep\n")
    assert started["pid"] == started["init"]  # a daemon of 0.1.0 reads this one
    assert int(stat.rsplit(")", 1)[1].split()[19]) == started["start_ticks"]
    assert int(stat.rsplit(")", 1)[1].split()[1]) == container.shim
    assert (container.directory / "state" / "shim.sock").stat().st_mode & 0o777 == 0o600


def test_a_runtime_that_ends_before_its_fork_which_started_the_container(host: Host, tmp_path: Path) -> None:
    # crun does so with --detach, but for too short a time to be seen each time.
    runtime = tmp_path / "runtime"
    runtime.write_text(FORKING_RUNTIME.format(python=sys.executable, runc=shutil.which("runc")))
    runtime.chmod(0o755)
    script = "trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done"
    container = host.fork(host.prepare("c", "sh", "-c", script) | host.runtime(runtime))
    container.started()
    eventually(lambda: container.log() == b"up\n")
    eventually(lambda: parent(container.init) == container.shim)  # the fork has let go of it
    container.kill(signal.SIGTERM)
    assert container.finished()["code"] == 6


@pytest.fixture
def hasty(rootfs: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """Shims that give one command of a runtime up soon."""
    host = Host(rootfs, limits={request.param: HASTY})
    try:
        host.nursery.greeting()
        yield host
    finally:
        host.close()


def _hanging(directory: Path, command: str) -> tuple[str, Callable[[], list[str]]]:
    """A runtime that hangs in a command, and what it has started and is there still."""
    mark = f"85{os.getpid() % 1000:03}"
    runtime = directory / "hanging"
    runtime.write_text(HANGING_RUNTIME.format(command=command, runc=shutil.which("runc"), mark=mark))
    runtime.chmod(0o755)
    return str(runtime), lambda: [
        f"{pid} {words}" for pid, words in processes() if f"sleep {mark} " in words or str(runtime) in words
    ]


@pytest.mark.parametrize("hasty", ["shim._RUN_LIMIT"], indirect=True)
def test_a_start_that_does_not_come_back_ends_with_all_that_it_has_made(hasty: Host, tmp_path: Path) -> None:
    runtime, left = _hanging(tmp_path, "run")
    container = hasty.fork(hasty.prepare("c", "sleep", "1000") | hasty.runtime(runtime))
    failed = container.client.expect("failed")
    assert (failed["error"], failed["late"]) == (f"{runtime} run did not come back within {HASTY:g} s", True)
    eventually(lambda: left() == [])  # they are killed; the kernel takes a moment
    eventually(lambda: not (container.directory / "state" / "shim.sock").exists())
    assert not any(Path("/sys/fs/cgroup").glob(f"*{CGROUP}/c"))


@pytest.mark.parametrize("hasty", ["execs._EXEC_LIMIT"], indirect=True)
def test_an_exec_that_does_not_come_back_ends_with_all_that_it_has_made(hasty: Host, tmp_path: Path) -> None:
    runtime, left = _hanging(tmp_path, "exec")
    container = hasty.fork(hasty.prepare("c", "sleep", "1000") | hasty.runtime(runtime))
    container.client.expect("started")
    _, streams = _exec(container, "e1", "sleep", "999")
    failed = container.client.expect("exec-failed")
    assert (failed["error"], failed["late"]) == (f"{runtime} exec did not come back within {HASTY:g} s", True)
    eventually(lambda: left() == [])  # they are killed; the kernel takes a moment
    # What ran already, though nobody had been told of it, holds the output no more.
    assert (_read_all(streams["stdout"]), _read_all(streams["stderr"])) == (b"", b"")
    os.close(streams["stdin"])
    assert container.running()


def test_a_runtime_that_fails_in_time_is_not_late(host: Host) -> None:
    container = host.fork(host.prepare("c", "/no/such/command"))
    assert container.client.expect("failed")["late"] is False


def test_a_code_of_the_containers_own(host: Host) -> None:
    assert host.start("c", "sh", "-c", "exit 3").finished()["code"] == 3


def test_the_code_of_a_signal(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    container.kill()
    assert container.finished()["code"] == 137


def test_a_command_that_is_not_there(host: Host) -> None:
    container = host.fork(host.prepare("c", "no-such-command"))
    error = container.client.expect("failed")["error"]
    assert "no-such-command" in error
    assert "not found" in error
    assert "\n" not in error
    eventually(lambda: not (container.directory / "state" / "shim.sock").exists())
    assert not (host.runtime_root / "c").exists()
    assert not (container.directory / "state" / "exit.json").exists()
    assert container.log("stderr") == b""


@pytest.mark.parametrize("key", ["runtime_command", "log_path"])
def test_a_start_that_cannot_be_tried_says_why(host: Host, key: str) -> None:
    config = host.prepare("c", "true") | {key: ["/no/such/thing"] if key == "runtime_command" else "/no/such/thing"}
    container = host.fork(config)
    assert "/no/such/thing" in container.client.expect("failed")["error"]


def test_the_shim_outlives_the_daemon_and_the_nursery(host: Host) -> None:
    container = host.start("c", "sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done")
    container.client.close()
    host.nursery.close()
    host.process.wait(WAIT)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(container.shim, number)
    client = container.reconnect()
    greeting = client.greeting()
    assert greeting["version"] == 2
    assert (greeting["state"], greeting["init"]) == ("running", container.init)
    eventually(lambda: container.log() == b"up\n")
    container.kill(signal.SIGTERM)
    assert client.expect("exited")["code"] == 7
    client.expect("gone")
    client.close()
    assert container.exit_record()["code"] == 7
    assert container.log() == b"up\nbye\n"


def test_an_end_without_any_daemon_is_on_disk(host: Host) -> None:
    container = host.start("c", "sh", "-c", "sleep 0.5; exit 5")
    container.client.close()
    eventually(lambda: not (container.directory / "state" / "shim.sock").exists())
    assert container.exit_record()["code"] == 5


def test_several_connections_hear_the_same(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    second = container.reconnect()
    second.greeting()
    container.kill()
    assert second.expect("exited")["code"] == 137
    second.expect("gone")
    assert container.finished()["code"] == 137
    second.close()


def test_signals_are_not_ignored_inside(host: Host) -> None:
    container = host.start("c", "grep", "SigIgn", "/proc/self/status")
    container.finished()
    ignored = int(container.log().split()[1], 16)
    assert ignored & (1 << 31) - 1 == 0  # those above are the C library's own


def test_no_descriptor_leaks_into_the_container(host: Host) -> None:
    container = host.start("c", "ls", "/proc/self/fd")
    container.finished()
    assert container.log().split() == [b"0", b"1", b"2", b"3"]  # the last is the listing's own


def test_unknown_and_malformed_requests_are_answered(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    client = container.client
    assert "unknown operation 'dance'" in client.ask("dance")["error"]
    for keys in ({"op": None}, {"op": ["exec"]}, {"op": "attach", "streams": 9}, {"op": "exec"}, {}):
        client.number += 1
        client.channel.send({**keys, "re": client.number})
        answer, _ = client.find(lambda message: message.get("re") == client.number)
        assert answer["error"]
    other = container.reconnect()
    other.channel.sock.sendall(b"\xff" * 64)
    with pytest.raises(EOFError):
        other.find(lambda _: False)
    other.close()
    assert client.ask("status") == {"re": client.number, "ok": True}
    assert container.running()


def test_the_nursery_refuses_what_it_cannot_fork(host: Host) -> None:
    assert "config" in host.nursery.ask("fork")["error"]
    one, two = socket.socketpair()
    assert "'id'" in host.nursery.ask("fork", [one.fileno()], config={})["error"]
    assert "unknown operation" in host.nursery.ask("dance")["error"]
    one.close()
    two.settimeout(WAIT)
    assert two.recv(1) == b""  # the nursery has not kept the descriptor
    two.close()
    host.start("c", "true").finished()


def _exec(container: Container, exec_id: str, *args: str, **keys: Any) -> tuple[Message, dict[str, int]]:
    """Ask for an exec; returns the answer and our ends of its standard streams."""
    spec = container.directory / f"{exec_id}.json"
    spec.write_text(json.dumps(process_spec(args)))
    stdin, ours_in = os.pipe()
    ours_out, stdout = os.pipe()
    ours_err, stderr = os.pipe()
    answer = container.client.ask("exec", [stdin, stdout, stderr], exec_id=exec_id, spec=str(spec), **keys)
    for fd in (stdin, stdout, stderr):
        os.close(fd)
    return answer, {"stdin": ours_in, "stdout": ours_out, "stderr": ours_err}


def _read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def test_exec(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    answer, streams = _exec(container, "e1", "sh", "-c", "cat; echo err >&2; exit 4")
    assert answer["ok"]
    os.write(streams["stdin"], b"in and out")
    os.close(streams["stdin"])
    assert _read_all(streams["stdout"]) == b"in and out"
    assert _read_all(streams["stderr"]) == b"err\n"
    started = container.client.expect("exec-started")
    assert started == {"event": "exec-started", "exec": "e1"}  # daemons of 0.2.0 take "exec_id" for the end
    exited = container.client.expect("exec-exited")
    assert (exited["exec_id"], exited["code"]) == ("e1", 4)
    assert exited["exec"] == exited["exec_id"]  # a daemon of 0.1.0 reads this one
    assert container.log() == b""
    assert not list((container.directory / "state").glob("exec-*"))


def test_exec_of_a_command_that_is_not_there(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    _, streams = _exec(container, "e1", "no-such-command")
    assert "no-such-command" in container.client.expect("exec-failed")["error"]
    for fd in streams.values():
        os.close(fd)
    assert container.running()


def test_an_exec_ends_with_its_connection_and_with_its_whole_group(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    _, streams = _exec(container, "e1", "sh", "-c", "sleep 999 & echo up; wait")
    assert os.read(streams["stdout"], 100) == b"up\n"
    assert len(members("c")) == 3
    container.client.close()
    assert _read_all(streams["stdout"]) == b""  # the sleep holds it no more
    eventually(lambda: len(members("c")) == 1)
    os.close(streams["stdin"])
    os.close(streams["stderr"])
    assert container.running()


def test_exec_with_a_terminal(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    spec = container.directory / "e1.json"
    spec.write_text(json.dumps(process_spec(("sh", "-c", "[ -t 0 ] && echo terminal; exit 6"), tty=True)))
    path = str(container.directory / "tty.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.settimeout(WAIT)
    assert container.client.ask("exec", exec_id="e1", spec=str(spec), console=path)["ok"]
    connection, _ = listener.accept()
    connection.settimeout(WAIT)
    _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    assert os.read(fds[0], 100) == b"terminal\r\n"
    assert container.client.expect("exec-exited")["code"] == 6
    os.close(fds[0])
    connection.close()
    listener.close()


def children(pid: int) -> list[str]:
    """The names of a process's children."""
    names = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            names.append(Path(f"/proc/{child}/comm").read_text().strip())
    return names


def test_execs_end_with_the_container(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    _, streams = _exec(container, "e1", "sleep", "999")
    # The shim has both for its children, and the OCI runtime that has started the second one is gone.
    eventually(lambda: children(container.shim) == ["sleep", "sleep"])
    container.kill()
    assert container.client.expect("exec-exited")["code"] == 137
    assert container.finished()["code"] == 137
    for fd in streams.values():
        os.close(fd)


def test_reopen(host: Host) -> None:
    container = host.start("c", "sh", "-c", "trap 'echo two' USR1; echo one; while :; do sleep 0.1; done")
    eventually(lambda: container.log() == b"one\n")
    (container.directory / "0.log").rename(container.directory / "0.log.1")
    assert container.client.ask("reopen")["ok"]
    container.kill(signal.SIGUSR1)
    eventually(lambda: container.log() == b"two\n")
    assert container.log(name="0.log.1") == b"one\n"


def test_terminal(host: Host) -> None:
    container = host.start("c", "sh", "-c", "[ -t 2 ] && echo up; read line; echo got $line; stty size", tty=True)
    eventually(lambda: container.log() == b"up\r\n")
    reader, writer = os.pipe()
    answer, fds = container.client.request("attach", [writer], streams=["stdout"])
    os.close(writer)
    assert answer["ok"]
    fcntl.ioctl(fds[0], termios.TIOCSWINSZ, array.array("H", [33, 99, 0, 0]))
    os.write(fds[0], b"this\n")
    assert container.finished()["code"] == 0
    assert container.log() == b"up\r\nthis\r\ngot this\r\n33 99\r\n"
    assert _read_all(reader) == b"this\r\ngot this\r\n33 99\r\n"
    os.close(fds[0])


def test_attach(host: Host) -> None:
    container = host.start("c", "sh", "-c", "cat; echo end >&2", stdin=True)
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    answer, fds = container.client.request("attach", [out_end, err_end], streams=["stdout", "stderr"])
    assert answer["ok"]
    os.close(out_end)
    os.close(err_end)
    os.write(fds[0], b"hello\n")
    assert os.read(out, 100) == b"hello\n"
    assert container.client.ask("close-stdin")["ok"]
    os.close(fds[0])
    assert container.finished()["code"] == 0
    assert _read_all(out) == b""
    assert _read_all(err) == b"end\n"
    assert container.log() == b"hello\n"


def test_standard_input_stays_open_without_any_client(host: Host) -> None:
    container = host.start("c", "cat", stdin=True)
    time.sleep(0.3)
    assert container.running()
    container.client.ask("close-stdin")
    assert container.finished()["code"] == 0


def unread(fd: int) -> int:
    """How many bytes are in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def test_a_slow_client_gets_all_and_one_that_leaves_holds_nothing_up(host: Host) -> None:
    script = "cat; yes 0123456789 | head -c 3000000; exit 0"
    container = host.start("c", "sh", "-c", script, stdin=True)
    readers = []
    for _ in range(2):
        reader, writer = os.pipe()
        container.client.ask("attach", [writer], streams=["stdout"])
        os.close(writer)
        readers.append(reader)
    container.client.ask("close-stdin")
    eventually(lambda: unread(readers[0]) > 32 << 10)
    os.close(readers[0])  # it was never read
    data = _read_all(readers[1])
    assert container.finished()["code"] == 0
    assert len(data) == 3_000_000
    assert container.log() == data


def test_a_huge_output_is_whole(host: Host) -> None:
    script = "yes 'a line of some length, as applications write them' | head -c 50000000"
    container = host.start("c", "sh", "-c", script)
    assert container.finished()["code"] == 0
    line = b"a line of some length, as applications write them\n"
    expected = (line * (50_000_000 // len(line) + 1))[:50_000_000]
    log = container.log()
    assert len(log) == len(expected)
    assert hashlib.sha256(log).digest() == hashlib.sha256(expected).digest()


@pytest.fixture
def patient(rootfs: Path) -> Iterator[Host]:
    """Shims that wait for the last of an output for so long that a test would notice."""
    host = Host(rootfs, limits={"shim._LAST_DRAIN": 300.0})
    try:
        host.nursery.greeting()
        yield host
    finally:
        host.close()


def test_leftover_processes_do_not_keep_the_end_from_being_told(patient: Host) -> None:
    container = patient.start("c", "sh", "-c", "sleep 999 & echo said; exit 3", own_pids=False)
    assert container.finished()["code"] == 3  # deleted at once, without waiting out the drain
    assert container.log() == b"said\n"
    assert not Path(f"/sys/fs/cgroup/memory{CGROUP}/c").exists()


def test_a_pipe_held_from_outside_delays_the_end_by_a_bound(host: Host) -> None:
    container = host.start("c", "sh", "-c", "echo said; exec sleep 1000")
    held = os.open(f"/proc/{container.init}/fd/1", os.O_WRONLY)
    eventually(lambda: container.log() == b"said\n")
    container.kill()
    assert container.finished()["code"] == 137
    assert container.log() == b"said\n"
    os.close(held)


def test_orphans_are_reaped(host: Host) -> None:
    container = host.start("c", "sh", "-c", "(sleep 0.2 &); exec sleep 1000", own_pids=False)
    children = Path(f"/proc/{container.shim}/task/{container.shim}/children")
    eventually(lambda: len(members("c")) == 1)
    eventually(lambda: len(children.read_text().split()) == 1)


def test_the_nursery_reaps_what_a_killed_shim_leaves(host: Host) -> None:
    container = host.start("c", "sleep", "1000")
    os.kill(container.shim, signal.SIGKILL)
    eventually(lambda: parent(container.init) == host.process.pid)
    container.kill()
    eventually(lambda: not Path(f"/proc/{container.init}").exists())


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_out_of_memory(host: Host) -> None:
    container = host.start("c", "tail", "/dev/zero", memory=16 << 20)
    exited = container.finished()
    assert (exited["code"], exited["oom_killed"]) == (137, True)
    assert container.exit_record()["oom_killed"] is True


def test_short_lives_never_lose_their_code(host: Host) -> None:
    for number in range(50):
        exited = host.start(f"c{number}", "sh", "-c", f"exit {number}").finished()
        assert exited["code"] == number


def test_a_long_state_directory(host: Host) -> None:
    name = "x" * 120
    config = host.prepare("c", "sh", "-c", "echo here", tty=True)
    state = Path(config["bundle"]) / name
    state.mkdir()
    container = host.fork(config | {"directory": str(state)})
    container.client.expect("started")
    assert (state / "shim.sock").is_socket()
    container.client.expect("gone")
    assert container.log() == b"here\r\n"


def test_a_shim_is_small(host: Host) -> None:
    containers = [host.start(f"c{number}", "sleep", "1000") for number in range(3)]
    rollup = Path(f"/proc/{containers[0].shim}/smaps_rollup").read_text()
    private = sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE))
    assert private < 1536  # KiB; about 1100 is what it takes
