"""What one plugin of NRI costs: the same pods without a plugin, and with one that is told of every event, in turn.

    python -m bench.nri [--rounds N] [--plugin PROGRAM]

The plugin is a small process of this file, which answers each call at once and with nothing. PROGRAM is another one,
such as the NRI project's template; it gets the socket in NRI_PLUGIN_SOCKET, as a plugin that the daemon starts.
README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable

from bench import isolation
from bench.images import build_images
from bench.lives import Pod
from bench.nodes import Criserver
from bench.processes import on_cpu
from bench.run import Run, Sizes

ROWS = ("RunPodSandbox", "CreateContainer", "StartContainer", "pod-up", "pod-down")
CPU = "CPU of the daemon, all calls"
WITHOUT, WITH = "without", "with"
# Seconds between two pods: what the daemon still does in the background is not to fall into the other's time.
REST = 0.1

_MUX, _TTRPC = struct.Struct(">II"), struct.Struct(">IIBB")
_PLUGIN, _RUNTIME = 1, 2
_REQUEST, _RESPONSE = 1, 2
_EMPTY = b"\n\0"  # a Response with a Status of OK


def answer_all(path: str) -> None:
    """A plugin without any work of its own. It prints a line once it is told of everything."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as frames:
        connection.connect(path)
        call = _field(1, b"nri.pkg.api.v1alpha1.Runtime") + _field(2, b"RegisterPlugin")
        call += _field(3, _field(1, b"bench") + _field(2, b"10"))
        _send(connection, _RUNTIME, _TTRPC.pack(len(call), 1, _REQUEST, 0) + call)
        partial = b""
        while head := frames.read(_MUX.size):
            channel, size = _MUX.unpack(head)
            data = frames.read(size)
            if channel != _PLUGIN:
                continue
            partial += data
            while len(partial) >= _TTRPC.size:
                size, stream, _, _ = _TTRPC.unpack(partial[: _TTRPC.size])
                if len(partial) < _TTRPC.size + size:
                    break
                request, partial = partial[_TTRPC.size : _TTRPC.size + size], partial[_TTRPC.size + size :]
                _send(connection, _PLUGIN, _TTRPC.pack(len(_EMPTY), stream, _RESPONSE, 0) + _EMPTY)
                if b"Synchronize" in request[:64]:
                    print("synchronized", flush=True)


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2, len(content))) + content


def _send(connection: socket.socket, channel: int, data: bytes) -> None:
    connection.sendall(_MUX.pack(channel, len(data)) + data)


class NriNode(Criserver):
    """A daemon with an NRI socket of its own, and no plugins of the node."""

    def configuration(self) -> str:
        self.nri_socket = f"{self.base}/nri.sock"
        nri = f'[nri]\nsocket_path = "{self.nri_socket}"\nplugin_path = "{self.base}/plugins"\n'
        return super().configuration() + nri

    def connected(self) -> int:
        """How many plugins have been told of everything so far."""
        return self.log().count('"NRI plugin connected"')

    def gone(self) -> int:
        """How many connections of plugins have ended so far."""
        return self.log().count('"NRI plugin gone"')


def plug(node: NriNode, program: str | None) -> Callable[[], None]:
    """Connect a plugin, and return what disconnects it."""
    connected, gone = node.connected(), node.gone()
    command = [program] if program else [sys.executable, "-m", "bench.nri", "--answer-all"]
    with socket.socket(socket.AF_UNIX) as connection:
        environment = dict(os.environ)
        if program:
            connection.connect(node.nri_socket)
            environment["NRI_PLUGIN_SOCKET"] = str(connection.fileno())
            environment |= {"NRI_PLUGIN_NAME": "bench", "NRI_PLUGIN_IDX": "10"}
        else:
            command.append(node.nri_socket)
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            command, env=environment, pass_fds=(connection.fileno(),), stdin=null, stdout=null, stderr=null
        )
    _until(lambda: node.connected() > connected, "a plugin cannot connect")

    def unplug() -> None:
        process.kill()
        process.wait()
        _until(lambda: node.gone() > gone, "a plugin does not go")

    return unplug


def _until(holds: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(failure)
        time.sleep(0.01)


def life(node: NriNode, name: str) -> dict[str, float]:
    """One pod with a container, from beginning to end: milliseconds by row."""
    took: dict[str, float] = {}
    used = on_cpu([node.process.pid])
    pod = Pod(node, name)
    pod.up(took.__setitem__)
    pod.down(took.__setitem__)
    time.sleep(REST)
    return {**{row: took[row] for row in ROWS}, CPU: (on_cpu([node.process.pid]) - used) * 1000}


def measure(rounds: int, program: str | None) -> dict[str, dict[str, list[float]]]:
    """Samples by row, and in a row by whether there was a plugin; the first round is not counted."""
    samples: dict[str, dict[str, list[float]]] = {row: {WITHOUT: [], WITH: []} for row in (*ROWS, CPU)}
    with (
        isolation.scratch() as base,
        Run(base, "", Sizes()).place() as (directory, disk),
        NriNode(directory, disk, 1) as node,
    ):
        node.load_images(build_images(directory))
        for number in range(rounds + 1):
            for who in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
                unplug = plug(node, program) if who is WITH else lambda: None
                time.sleep(REST)
                for row, value in life(node, f"pod{number}{who}").items():
                    if number:
                        samples[row][who].append(value)
                unplug()
    return samples


def table(samples: dict[str, dict[str, list[float]]]) -> str:
    """Medians and quartiles in milliseconds, and the medians' difference."""
    lines = [f"{'median (quartiles), ms':40}{WITHOUT:>26}{WITH:>26}{'difference':>12}"]
    for row, found in samples.items():
        line = f"{row:40}"
        for values in found.values():
            low, middle, high = statistics.quantiles(values, n=4)
            line += f"{f'{middle:.1f} ({low:.1f}-{high:.1f})':>26}"
        lines.append(f"{line}{statistics.median(found[WITH]) - statistics.median(found[WITHOUT]):>+12.1f}")
    return "\n".join(lines)


def _rounds(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError("at least 2 are needed")
    return number


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--answer-all"]:
        answer_all(arguments[1])
        return
    parser = argparse.ArgumentParser(prog="python -m bench.nri", description="Measure what one plugin of NRI costs.")
    parser.add_argument(
        "--rounds", type=_rounds, default=40, metavar="N", help="pods without a plugin, and with one (40)"
    )
    parser.add_argument("--plugin", metavar="PROGRAM", help="another plugin")
    isolation.run("bench.nri", parser, lambda options: table(measure(options.rounds, options.plugin)))


if __name__ == "__main__":
    main()
