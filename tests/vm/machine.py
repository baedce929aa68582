"""The virtual machine: QEMU around the image, and commands run in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.vm import image
from tests.vm.image import Image

MEMORY = 4096  # MiB
PROCESSORS = 2
PROBE = 15.0  # seconds until the guest's agent answers, where KVM works
BOOT = 180.0  # seconds; 15 where nothing else runs
PROJECT = "/opt/criserver-tree"  # the work tree in the guest
PYTHON = "/opt/tests/bin/python"  # has what the tests need, not the project
PORT = "criserver.vm"
HEADER = struct.Struct(">cI")
BLOCK = 1 << 16

KERNEL_ARGUMENTS = (
    "root=/dev/nvme0n1 rw console=ttyS0 quiet panic=-1 mitigations=off psi=1 net.ifnames=0 systemd.show_status=0 "
    "systemd.log_level=notice"
)
# Of the two modules a kernel has one. SELinux only says what it would refuse: the disk's files have no labels.
SECURITY = {"apparmor": "apparmor=1 security=apparmor", "selinux": "selinux=1 security=selinux enforcing=0"}


class MachineError(Exception):
    """The machine does not boot, or has gone."""


@dataclass(frozen=True)
class Completed:
    """What a command did; ``status`` as a shell tells it."""

    status: int
    stdout: bytes
    stderr: bytes


class Machine:
    """A booted machine whose disk forgets at its end what was written. Use ``machine()``."""

    def __init__(
        self, disk: Image, directory: str, *, accelerator: str, security: str = "apparmor", memory: int = MEMORY
    ) -> None:
        self.accelerator = accelerator.partition(",")[0]
        self.console = f"{directory}/console.log"
        self._channel, theirs = socket.socketpair()
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "q35", "-smp", str(PROCESSORS), "-m", str(memory)]
        command += ["-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max"]
        command += ["-kernel", disk.kernel, "-append", f"{KERNEL_ARGUMENTS} {SECURITY[security]}"]
        command += ["-drive", f"file={disk.disk},format=raw,if=none,id=root,snapshot=on,cache=unsafe"]
        command += ["-device", "nvme,drive=root,serial=root"]
        command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        command += ["-device", "virtio-rng-pci"]
        command += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={theirs.fileno()}"]
        command += ["-device", f"virtserialport,chardev=agent,name={PORT}"]
        command += ["-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"]
        with theirs, open(f"{directory}/qemu.log", "wb") as log:
            self._qemu = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "TMPDIR": directory},  # where the written blocks go
                start_new_session=True,
            )
        self.log = log.name

    def wait_for_boot(self, seconds: float = BOOT) -> str:
        """Wait until systemd has started everything; its verdict, "running" or "degraded". Raises MachineError."""
        state = self.run(["systemctl", "is-system-running", "--wait"], seconds=seconds)
        return state.stdout.decode().strip()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str = "/root",
        env: Mapping[str, str] | None = None,
        seconds: float = 600,
        patience: float = 60,
        tee: Callable[[bytes], object] | None = None,
    ) -> Completed:
        """Run a command as root in the guest. It is killed at its deadline: status 137.

        Raises MachineError where the guest does not answer ``patience`` seconds after that.
        """
        request = {"argv": list(argv), "cwd": cwd, "env": {"HOME": "/root", **(env or {})}}
        self._send(b"R", json.dumps(request).encode())
        for start in range(0, len(stdin), BLOCK):
            self._send(b"I", stdin[start : start + BLOCK])
        self._send(b"I", b"")
        outputs = {b"O": bytearray(), b"E": bytearray()}
        deadline = time.monotonic() + seconds
        killed = False
        while True:
            if not self._readable(deadline - time.monotonic()):
                if killed:
                    raise MachineError(f"no answer from the guest\n{self.console_tail()}")
                self._send(b"K", b"")
                killed = True
                deadline = time.monotonic() + patience
                continue
            kind, data = self._receive()
            if kind == b"X":
                return Completed(json.loads(data)["status"], bytes(outputs[b"O"]), bytes(outputs[b"E"]))
            outputs[kind] += data
            if tee is not None:
                tee(data)

    def check(self, argv: Sequence[str], **options: object) -> bytes:
        """Run a command that must succeed; what it prints. Raises MachineError."""
        done = self.run(argv, **options)  # type: ignore[arg-type]
        if done.status != 0:
            raise MachineError(
                f"{argv[0]} in the guest ended with {done.status}:\n"
                f"{(done.stdout + done.stderr)[-4000:].decode(errors='replace')}"
            )
        return done.stdout

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file into the guest, its directory made."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.check(["sh", "-c", script, "put", path, f"{mode:o}"], stdin=data)

    def put_project(self) -> None:
        """Write the work tree, as it is now and with its generated modules, to PROJECT in the guest."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=image.PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
        names = [name for name in names if name and os.path.lexists(f"{image.PROJECT}/{name}")]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in (*names, "criserver/pb"):
                tar.add(f"{image.PROJECT}/{name}", name, filter=_of_root)
        self.check(["mkdir", "-p", PROJECT])
        self.check(["tar", "-xf", "-", "-C", PROJECT], stdin=buffer.getvalue())

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        return self.check(["cat", path])

    def console_tail(self) -> str:
        """The end of what kernel and systemd wrote to the console, and QEMU itself."""
        text = ""
        for path in (self.console, self.log):
            with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as f:
                text += f.read()[-3000:]
        return text

    def close(self) -> None:
        """End QEMU; the disk's changes go with it."""
        self._channel.close()
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()

    def _send(self, kind: bytes, data: bytes) -> None:
        try:
            self._channel.sendall(HEADER.pack(kind, len(data)) + data)
        except OSError:
            raise MachineError(f"the machine has gone\n{self.console_tail()}") from None

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._channel], [], [], max(seconds, 0))[0])

    def _receive(self) -> tuple[bytes, bytes]:
        kind, size = HEADER.unpack(self._exactly(HEADER.size))
        return kind, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = self._channel.recv(size, socket.MSG_WAITALL) if size else b""
        if len(data) != size:
            raise MachineError(f"the machine has gone\n{self.console_tail()}")
        return data


def accelerator(disk: Image) -> str:
    """ "kvm" where a guest really boots with it, which that its device is there does not say; else emulation."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with tempfile.TemporaryDirectory(prefix="criserver-vm-") as directory:
            guest = Machine(disk, directory, accelerator="kvm")
            try:
                guest.run(["true"], seconds=PROBE, patience=0)
                return "kvm"
            except MachineError:
                pass
            finally:
                guest.close()
    return "tcg,thread=multi"


@contextlib.contextmanager
def machine(disk: Image, security: str = "apparmor") -> Iterator[Machine]:
    """A machine booted to multi-user.target, ended in any case; ``security`` is a key of SECURITY.

    Raises MachineError.
    """
    with tempfile.TemporaryDirectory(prefix="criserver-vm-", dir=_roomy()) as directory:
        guest = Machine(disk, directory, accelerator=accelerator(disk), security=security)
        try:
            verdict = guest.wait_for_boot()
            if verdict != "running":
                units = guest.run(["systemctl", "--failed", "--no-legend", "--plain"]).stdout.decode()
                print(f"the guest is {verdict!r}:\n{units}", file=sys.stderr)
            yield guest
        finally:
            guest.close()


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry, owned by root; None for the host's compiled modules."""
    entry.uid = entry.gid = 0
    return None if entry.name.endswith(("__pycache__", ".pyc")) else entry


def _roomy() -> str:
    """Where the blocks that a guest writes go: a disk, since memory may be short with a guest in it."""
    return "/var/tmp" if shutil.disk_usage("/var/tmp").free > 8 << 30 else tempfile.gettempdir()
