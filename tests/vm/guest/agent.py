"""The guest's side: runs one command at a time for the host, over a virtio-serial port.

A frame is a letter, a length (4 bytes, big-endian) and that many bytes. From the host: R (a JSON object: argv, cwd,
env; starts a command), I (for its standard input; an empty one ends it), K (kill it and its process group). To the
host: O and E (standard output and error), X (a JSON object: status, as a shell would tell it).
"""

from __future__ import annotations

import glob
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any

NAME = "criserver.vm"
HEADER = struct.Struct(">cI")
BLOCK = 1 << 16


def find_port() -> str:
    """The device of the port with our name."""
    while True:
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(path) as f:
                if f.read().strip() == NAME:
                    return f"/dev/{path.split('/')[-2]}"
        time.sleep(0.05)


class Port:
    """Frames over the device."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame."""
        kind, size = HEADER.unpack(self._read(HEADER.size))
        return kind, self._read(size)

    def send(self, kind: bytes, data: bytes) -> None:
        """Write one frame."""
        view = memoryview(HEADER.pack(kind, len(data)) + data)
        while view:
            view = view[os.write(self.fd, view) :]

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            data = os.read(self.fd, min(size - len(parts), BLOCK))
            if not data:  # the host has gone
                time.sleep(0.1)
            parts += data
        return bytes(parts)


def run(port: Port, request: dict[str, Any]) -> None:
    """Run one command, its input and output relayed, until it has exited; its children may live on."""
    try:
        process = subprocess.Popen(
            request["argv"],
            cwd=request["cwd"],
            env={**os.environ, **request["env"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        port.send(b"E", f"{error}\n".encode())
        port.send(b"X", json.dumps({"status": 127}).encode())
        return
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    end = os.pidfd_open(process.pid)
    outputs = {process.stdout.fileno(): b"O", process.stderr.fileno(): b"E"}
    poll = select.poll()
    for fd in (end, port.fd, *outputs):
        poll.register(fd, select.POLLIN)
    ended = False
    while True:
        ready = dict(poll.poll(0 if ended else None))
        idle = True
        for fd in outputs.keys() & ready.keys():
            if data := os.read(fd, BLOCK):
                port.send(outputs[fd], data)
                idle = False
            else:
                poll.unregister(fd)
                del outputs[fd]
        if ended and idle:
            break
        if end in ready:
            ended = True
            poll.unregister(end)
        if ready.get(port.fd, 0) & select.POLLIN and not ended:
            kind, data = port.receive()
            if kind == b"K":
                os.killpg(process.pid, signal.SIGKILL)
            elif data:
                try:
                    process.stdin.write(data)
                except BrokenPipeError:
                    pass
            else:
                process.stdin.close()
    os.close(end)
    code = process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    port.send(b"X", json.dumps({"status": code if code >= 0 else 128 - code}).encode())


def main() -> None:
    """Serve for ever. Frames for a command that has ended are skipped."""
    port = Port(os.open(find_port(), os.O_RDWR))
    print("the agent serves", file=sys.stderr)
    while True:
        kind, data = port.receive()
        if kind == b"R":
            run(port, json.loads(data))


if __name__ == "__main__":
    main()
