"""``criserver top``: the pods or containers that use the most CPU or memory, drawn again and again."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import grpc

from criserver.cli.client import RUNTIME, connected, method
from criserver.cli.options import address
from criserver.cli.progress_display import short, size_words
from criserver.cli.table import Cell, coloured, count_words, lines, print_table
from criserver.pb.runtime.v1 import api_pb2 as cri

# The terminal's second screen without a cursor, and back: what was on the terminal is there again at the end.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
# To the upper left; the rest of a line; the rest of the screen.
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True, slots=True)
class Use:
    """What a pod or container uses: millicores of CPU over the last interval, and bytes.

    ``cpu`` is None for what was not there at the interval's beginning.
    ``pod`` is NAMESPACE/NAME. ``name`` is the container's, and "" for a pod. ``memory`` is the working set.
    ``processes`` is None for a container.
    """

    id: str
    pod: str
    name: str
    cpu: float | None
    memory: int
    processes: int | None
    writable_layer: int


# The CPU time of a cgroup in nanoseconds, and when it was read (Unix nanoseconds), by the ID.
_Readings = Mapping[str, tuple[int, int]]


def top(options: argparse.Namespace) -> int:
    """Draw until Ctrl-C. Where standard output is no terminal, or by an option, print once. Raises CriError."""
    with connected(address(options)) as channel:
        stats = _stats(channel)
        before = _readings(stats)
        if options.json or options.once or not _can_draw(sys.stdout):
            time.sleep(options.interval)
            found = _sorted(options, uses(_stats(channel), before, containers=options.containers))
            if options.json:
                print(json.dumps([_document(use) for use in found], indent=2))
            else:
                print(_summary(found, containers=options.containers))
                print_table(_rows(found, containers=options.containers), keep=_KEPT)
            return 0
        with _screen(sys.stdout):
            while True:
                found = _sorted(options, uses(stats, before, containers=options.containers))
                _draw(sys.stdout, found, containers=options.containers)
                before = _readings(stats)
                time.sleep(options.interval)
                stats = _stats(channel)


def uses(pods: Sequence[cri.PodSandboxStats], before: _Readings, *, containers: bool) -> list[Use]:
    """The use of each pod, or of each container that runs, since the readings ``before``."""
    found = []
    for pod in pods:
        name = f"{pod.attributes.metadata.namespace}/{pod.attributes.metadata.name}"
        layers = [c.writable_layer.used_bytes.value for c in pod.linux.containers]
        if not containers:
            processes = pod.linux.process.process_count.value
            found.append(_use(pod.attributes.id, name, "", pod.linux, before, processes, sum(layers)))
            continue
        for container, layer in zip(pod.linux.containers, layers, strict=True):
            if container.HasField("cpu"):  # one that does not run uses nothing
                of = container.attributes
                found.append(_use(of.id, name, of.metadata.name, container, before, None, layer))
    return found


def _use(
    key: str, pod: str, name: str, stats: Any, before: _Readings, processes: int | None, writable_layer: int
) -> Use:
    used, at = stats.cpu.usage_core_nano_seconds.value, stats.cpu.timestamp
    earlier, then = before.get(key, (used, at))
    cpu = round(max(0, used - earlier) * 1000 / (at - then), 1) if at > then else None
    return Use(key, pod, name, cpu, stats.memory.working_set_bytes.value, processes, writable_layer)


def _stats(channel: grpc.Channel) -> Sequence[cri.PodSandboxStats]:
    answer = method(channel, RUNTIME, "ListPodSandboxStats")(cri.ListPodSandboxStatsRequest())
    return list(answer.stats)


def _readings(pods: Sequence[cri.PodSandboxStats]) -> _Readings:
    found = {}
    for pod in pods:
        found[pod.attributes.id] = _reading(pod.linux.cpu)
        found |= {c.attributes.id: _reading(c.cpu) for c in pod.linux.containers}
    return found


def _reading(cpu: cri.CpuUsage) -> tuple[int, int]:
    return cpu.usage_core_nano_seconds.value, cpu.timestamp


def _sorted(options: argparse.Namespace, found: Sequence[Use]) -> list[Use]:
    def key(use: Use) -> tuple[float, str, str]:
        largest = {"cpu": use.cpu or 0.0, "memory": use.memory, "name": 0}
        return -largest[options.sort], use.pod, use.name

    return sorted(found, key=key)


def _rows(found: Sequence[Use], *, containers: bool) -> list[Sequence[str | Cell]]:
    heads = ("CPU", "MEMORY", "WRITABLE LAYER")
    first = ("CONTAINER", "POD") if containers else ("POD", "PROCESSES")
    rows: list[Sequence[str | Cell]] = [[Cell(head, "bold") for head in (first[0], "ID", *heads, first[1])]]
    for use in found:
        figures = (
            "-" if use.cpu is None else f"{use.cpu:.0f}m",
            size_words(use.memory),
            size_words(use.writable_layer),
        )
        name, last = (use.name, use.pod) if containers else (use.pod, str(use.processes))
        rows.append((name, short(use.id), *figures, last))
    return rows


_KEPT = (1, 2, 3, 4)


def _document(use: Use) -> dict[str, Any]:
    return {
        "id": use.id,
        "pod": use.pod,
        "container": use.name,
        "cpuMillicores": use.cpu,
        "memoryBytes": use.memory,
        "processes": use.processes,
        "writableLayerBytes": use.writable_layer,
    }


def _summary(found: Sequence[Use], *, containers: bool) -> str:
    cpu, memory = sum(use.cpu or 0.0 for use in found), sum(use.memory for use in found)
    what = count_words(len(found), "container" if containers else "pod")
    return f"{time.strftime('%H:%M:%S')}  {what}, {cpu / 1000:.2f} cores, {size_words(memory)} memory"


def _can_draw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _screen(stream: TextIO) -> Iterator[None]:
    """The terminal for drawing; at the end it is as before, also after Ctrl-C."""
    stream.write(_ENTER)
    try:
        yield
    finally:
        stream.write(_LEAVE)
        stream.flush()


def _draw(stream: TextIO, found: Sequence[Use], *, containers: bool) -> None:
    size = os.get_terminal_size(stream.fileno())
    table = lines(_rows(found, containers=containers), width=size.columns, keep=_KEPT, coloured=coloured(stream))
    drawn = [_summary(found, containers=containers)[: size.columns], *table][: max(size.lines - 1, 1)]
    stream.write(_HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in drawn) + _BELOW)
    stream.flush()
