"""A host for shims without a daemon: a nursery, bundles with busybox, and the daemon's side of their connections."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shims.launch import command
from shims.log_writer import MAX_LINE
from shims.wire import Channel
from tests.support.node import processes
from tests.support.waiting import SLOWNESS, eventually

Message = dict[str, Any]

WAIT = 30.0 * SLOWNESS
CGROUP = f"/criserver-test-shims-{os.getpid()}"  # of this run alone
RECORD = re.compile(rb"\S+ (stdout|stderr) ([FP]) ([^\n]*)\n", re.DOTALL)
APPLETS = ("sh", "sleep", "echo", "cat", "true", "tail", "yes", "head", "grep", "kill", "stty", "printf", "ls")


class Client:
    """A daemon's end of a connection to a shim or to the nursery."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT)
        self.channel = Channel(sock)
        self.waiting: list[tuple[Message, list[int]]] = []
        self.number = 0

    def find(self, wanted: Callable[[Message], bool]) -> tuple[Message, list[int]]:
        """The first message that is wanted; others are kept for later."""
        while True:
            for index, (message, _) in enumerate(self.waiting):
                if wanted(message):
                    return self.waiting.pop(index)
            self.waiting += self.channel.receive()

    def expect(self, event: str) -> Message:
        return self.find(lambda message: message.get("event") == event)[0]

    def greeting(self) -> Message:
        return self.find(lambda message: "hello" in message)[0]

    def request(self, op: str, fds: list[int] | None = None, **keys: Any) -> tuple[Message, list[int]]:
        self.number += 1
        number = self.number
        self.channel.send({"op": op, "re": number, **keys}, fds or ())
        return self.find(lambda message: message.get("re") == number)

    def ask(self, op: str, fds: list[int] | None = None, **keys: Any) -> Message:
        answer, received = self.request(op, fds, **keys)
        for fd in received:
            os.close(fd)
        return answer

    def close(self) -> None:
        self.channel.close()


class Container:
    """A container under a shim, with the connection that started it."""

    def __init__(self, directory: Path, client: Client, shim: int) -> None:
        """`shim` is the shim's PID; `init` is set once the container runs."""
        self.directory = directory
        self.client = client
        self.shim = shim
        self.init = 0

    def started(self) -> Message:
        """Wait until the container runs, and return the `started` event."""
        started = self.client.expect("started")
        self.init = started["init"]
        return started

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.init, number)

    def running(self) -> bool:
        client = self.reconnect()
        state = client.greeting()["state"]
        client.close()
        return bool(state == "running")

    def log(self, stream: str = "stdout", name: str = "0.log") -> bytes:
        data = (self.directory / name).read_bytes()
        records = list(RECORD.finditer(data))
        assert sum(len(record[0]) for record in records) == len(data)
        return b"".join(
            record[3] + (b"\n" if record[2] == b"F" else b"") for record in records if record[1] == stream.encode()
        )

    def exit_record(self) -> Message:
        return dict(json.loads((self.directory / "state" / "exit.json").read_bytes()))

    def reconnect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.directory / "state" / "shim.sock"))
        return Client(sock)

    def finished(self) -> Message:
        """Wait for the whole end and return the `exited` event."""
        exited = self.client.expect("exited")
        self.client.expect("gone")
        eventually(lambda: not (self.directory / "state" / "shim.sock").exists())
        return exited


class Host:
    """A nursery and the containers started through it; `close` ends all of it."""

    def __init__(self, rootfs: Path, release: Path | None = None, limits: dict[str, float] | None = None) -> None:
        """`limits` replace those of the package, by module and name; `release` has the package shims of 0.1.0."""
        self.rootfs = rootfs
        self.directory = Path(tempfile.mkdtemp(dir="/run", prefix="shims-"))
        self.runtime_root = self.directory / "runc"
        self.containers: dict[str, Container] = {}
        self.clients: list[Client] = []
        ours, theirs = socket.socketpair()
        self.nursery = Client(ours)
        argv = command(sys.executable, theirs.fileno())
        place = argv.index("-c") + 1
        for name, seconds in (limits or {}).items():
            module = f"shims.{name.rpartition('.')[0]}"
            changed = f"import {module}; shims.{name} = {seconds}; from shims.nursery_process"
            argv[place] = argv[place].replace("from shims.nursery_process", changed)
        if release is not None:
            argv[place] = f"import sys; sys.path.insert(0, {str(release)!r}); from shims.nursery import main; "
            argv[place] += "main(int(sys.argv[1]))"
        self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], close_fds=True)
        theirs.close()

    def runtime(self, program: str | Path) -> Message:
        """The part of a shim's configuration that names this OCI runtime."""
        return {"runtime_command": [str(program), "--root", str(self.runtime_root)]}

    def prepare(self, name: str, *args: str, **options: Any) -> Message:
        """A bundle on disk and the shim's configuration for it."""
        directory = self.directory / name
        (directory / "state").mkdir(parents=True)
        tty = bool(options.get("tty"))
        (directory / "config.json").write_text(json.dumps(_spec(self.rootfs, name, args, **options)))
        return {
            "id": name,
            "bundle": str(directory),
            **self.runtime(shutil.which("runc") or "runc"),
            # Of shims of 0.1.0.
            "runtime": shutil.which("runc"),
            "runtime_root": str(self.runtime_root),
            "runtime_args": [],
            "log_path": str(directory / "0.log"),
            "max_line": int(options.get("max_line", MAX_LINE)),
            "tty": tty,
            "stdin": bool(options.get("stdin")),
            "directory": str(directory / "state"),
            "oom_files": [f"/sys/fs/cgroup/memory{CGROUP}/{name}/memory.oom_control"],
            "a key of a later version": 1,
        }

    def fork(self, config: Message) -> Container:
        ours, theirs = socket.socketpair()
        answer = self.nursery.ask("fork", [theirs.fileno()], config=config)
        theirs.close()
        client = Client(ours)
        self.clients.append(client)
        assert answer.get("ok"), answer
        assert client.greeting()["state"] == "starting"
        container = Container(Path(config["bundle"]), client, shim_in(config["directory"]))
        self.containers[config["id"]] = container
        return container

    def start(self, name: str, *args: str, **options: Any) -> Container:
        container = self.fork(self.prepare(name, *args, **options))
        container.started()
        return container

    def close(self) -> None:
        self.nursery.close()
        self.process.wait(WAIT)
        for name, container in self.containers.items():
            # A shim that has ended is not killed by its number: only one that is ours still.
            if is_shim_of(container.shim, str(container.directory / "state")):
                os.kill(container.shim, signal.SIGKILL)
            subprocess.run(
                ["runc", "--root", str(self.runtime_root), "delete", "--force", name],
                capture_output=True,
                timeout=WAIT,
                check=False,
            )
        for client in self.clients:
            client.close()
        shutil.rmtree(self.directory)


def shim_in(directory: str) -> int:
    """The PID of the shim with a state directory; 0 if it has ended."""
    return next((pid for pid, _ in processes() if is_shim_of(pid, directory)), 0)


def is_shim_of(pid: int, directory: str) -> bool:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="surrogateescape")
        return name == "criserver-shim\n" and os.readlink(f"/proc/{pid}/cwd") == directory
    except OSError:
        return False


def _spec(
    rootfs: Path,
    name: str,
    args: tuple[str, ...],
    tty: bool = False,
    own_pids: bool = True,
    memory: int = 0,
    stdin: bool = False,
) -> Message:
    namespaces = ["ipc", "uts", "mount", *(["pid"] if own_pids else [])]
    return {
        "ociVersion": "1.0.2",
        "process": process_spec(args, tty),
        "root": {"path": str(rootfs), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666"],
            },
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "cgroupsPath": f"{CGROUP}/{name}",
            "resources": {"memory": {"limit": memory}} if memory else {},
        },
    }


def process_spec(args: tuple[str, ...], tty: bool = False) -> Message:
    return {
        "terminal": tty,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
    }


@pytest.fixture(scope="module")
def rootfs() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(dir="/run", prefix="shims-rootfs-"))
    for name in ("bin", "proc", "dev", "sys"):
        (root / name).mkdir()
    shutil.copy(os.path.realpath(shutil.which("busybox") or ""), root / "bin" / "busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    yield root
    shutil.rmtree(root)
    for directory in (*Path("/sys/fs/cgroup").glob(f"*{CGROUP}"), Path(f"/sys/fs/cgroup{CGROUP}")):
        if directory.is_dir():
            directory.rmdir()


def members(name: str) -> list[str]:
    return Path(f"/sys/fs/cgroup/memory{CGROUP}/{name}/cgroup.procs").read_text().split()
