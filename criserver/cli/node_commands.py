"""``criserver status``, ``events`` and ``du``: the node as a running daemon sees it.

Each function is one command. It gets the options and returns the exit code of the process. All raise CriError: with the
daemon's error if that refuses, NoAnswerError if it cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from criserver.cli.client import ADMIN, RUNTIME, as_json, connected, method
from criserver.cli.options import address
from criserver.cli.pod_commands import listed
from criserver.cli.progress_display import short, size_words
from criserver.cli.table import Cell, count_words, duration_words, print_table
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.text import printable

# The words that a pod or container state has in CRI, without what all of them begin with.
_POD, _CONTAINER = "SANDBOX_", "CONTAINER_"
_SHOWN_WARNINGS = 5
# Seconds after which work under way is shown in red: the kubelet gives most calls two minutes.
_LONG = 60


def status(options: argparse.Namespace) -> int:
    """Print how the daemon and the node are. The exit code is 1 if a condition of the node is not met."""
    socket = address(options)
    with connected(socket) as channel:
        document = status_document(channel, socket, stacks=False)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        _print_status(document)
    return 0 if all(condition["status"] for condition in document["conditions"]) else 1


def status_document(channel: grpc.Channel, socket: str, *, stacks: bool) -> dict[str, Any]:
    """The status as a JSON document; with ``stacks`` also what each thread and each task of the daemon is doing."""
    conditions = method(channel, RUNTIME, "Status")(cri.StatusRequest()).status.conditions
    pods, containers = listed(channel)
    node = method(channel, ADMIN, "NodeStatus")(admin.NodeStatusRequest(stacks=stacks))
    return {
        "socket": socket,
        **{name: value for name, value in as_json(node).items() if stacks or name != "stacks"},
        "conditions": [as_json(condition) for condition in conditions],
        "pods": _by_state((cri.PodSandboxState.Name(pod.state) for pod in pods), cri.PodSandboxState, _POD),
        "containers": _by_state((cri.ContainerState.Name(c.state) for c in containers), cri.ContainerState, _CONTAINER),
    }


def events(options: argparse.Namespace) -> int:
    """Print events as they happen, until the command is interrupted. The daemon's end is an error."""
    with connected(address(options)) as channel:
        for event in method(channel, RUNTIME, "GetContainerEvents")(cri.GetEventsRequest()):
            print(json.dumps(as_json(event)) if options.json else _event_line(event), flush=True)
    return 0


def du(options: argparse.Namespace) -> int:
    """Print what uses the disk, the largest first."""
    with connected(address(options)) as channel:
        use = method(channel, ADMIN, "DiskUse")(admin.DiskUseRequest())
    if options.json:
        print(json.dumps(as_json(use), indent=2))
        return 0
    print(_disk_words(as_json(use.totals)))
    images = sorted(use.images, key=lambda i: -(i.blobs + i.layers))
    rows: list[Sequence[str | Cell]] = [_heads("IMAGE", "ID", "BLOBS", "UNPACKED", "OWN", "USED BY")]
    for image in images:
        name = image.image.names[0] if image.image.names else "<none>"
        sizes = (size_words(size) for size in (image.blobs, image.layers, image.own))
        rows.append((name, short(image.image.id), *sizes, users_words(image.users)))
    print()
    print_table(rows, keep=(1, 2, 3, 4))
    rows = [_heads("CONTAINER", "ID", "WRITABLE LAYER", "INODES", "LOG")]
    for container in sorted(use.containers, key=lambda c: -(c.writable_layer + c.log)):
        measured = (size_words(container.writable_layer), str(container.inodes))
        layer = measured if container.measured_at else ("not measured", "-")
        rows.append((container.name, short(container.id), *layer, size_words(container.log)))
    print()
    print_table(rows, keep=(1, 2, 3, 4))
    return 0


def users_words(users: Sequence[str]) -> str:
    """The containers that use an image, in a few words."""
    if not users:
        return "-"
    return users[0] if len(users) == 1 else f"{users[0]} and {len(users) - 1} more"


def _by_state(states: Iterable[str], kinds: Any, prefix: str) -> dict[str, int]:
    """How many there are in each state; the names of states are those of CRI, in small letters."""
    counts = Counter(states)
    return {name.removeprefix(prefix).lower(): counts[name] for name in kinds.keys()}  # noqa: SIM118 - no dict


def _print_status(document: dict[str, Any]) -> None:
    up, disk = duration_words(document["uptimeSeconds"]), document["disk"]
    rows: list[Sequence[str | Cell]] = [
        ("Daemon", f"criserver {document['version']}, PID {document['pid']}, up {up}"),
        ("Socket", document["socket"]),
    ]
    for condition in document["conditions"]:
        met = Cell("yes", "green") if condition["status"] else Cell(f"no: {condition['message']}", "red")
        rows.append((condition["type"], met))
    rows += [
        ("Pods", _count_words(document["pods"])),
        ("Containers", _count_words(document["containers"])),
        ("Recovery", _recovery_words(document["recovering"])),
        ("Disk", _disk_words(disk)),
        ("", f"{size_words(disk['available'])} of {size_words(disk['capacity'])} free at {document['root']}"),
        ("Tasks", f"{count_words(document['tasks'], 'task')}, {count_words(document['threads'], 'thread')}"),
    ]
    print_table(rows)
    _print_calls(document["calls"])
    _print_warnings(document["warnings"][-_SHOWN_WARNINGS:])


def _print_calls(calls: Sequence[dict[str, Any]]) -> None:
    if not calls:
        print("\nNo work is under way.")
        return
    print("\nWork under way:")
    rows: list[Sequence[str | Cell]] = [_heads("RPC", "FOR", "POD", "CONTAINER", "CALL")]
    for call in calls:
        took = Cell(duration_words(call["seconds"]), "red" if call["seconds"] > _LONG else "")
        about = call["about"]
        rows.append((call["rpc"], took, about.get("pod", "-"), about.get("name", "-"), str(call["number"])))
    print_table(rows, indent="  ", keep=(0, 1))


def _print_warnings(warnings: Sequence[dict[str, Any]]) -> None:
    if not warnings:
        print("No warnings since the start.")
        return
    print("Last warnings:")
    rows: list[Sequence[str | Cell]] = []
    for warning in warnings:
        level = Cell(warning["level"], "red" if warning["level"] == "error" else "yellow")
        rows.append((_time(warning["at"]), level, f"{warning['event']}: {warning['fields']}".removesuffix(": ")))
    print_table(rows, indent="  ", keep=(0, 1))


def _event_line(event: cri.ContainerEventResponse) -> str:
    pod = event.pod_sandbox_status
    kind = cri.ContainerEventType.Name(event.container_event_type).removeprefix("CONTAINER_").removesuffix("_EVENT")
    name = f"{pod.metadata.namespace}/{pod.metadata.name}"
    # A deleted container is not among the statuses any more.
    found = [c for c in event.containers_statuses if c.id == event.container_id]
    if event.container_id == pod.id:
        what = "pod"
    else:
        what = found[0].metadata.name if found else "container"
    code = f" exit code {found[0].exit_code}" if found and found[0].state == cri.CONTAINER_EXITED else ""
    words = f"{_time(event.created_at)} {kind.lower():<7} {name} {what} {short(event.container_id)}{code}"
    return printable(words)


def _count_words(counts: dict[str, int]) -> str:
    words = [f"{number} {state}" for state, number in counts.items() if number]
    return ", ".join(words) or "none"


def _recovery_words(pods: Sequence[str]) -> str:
    return f"under way for {count_words(len(pods), 'pod')}: {', '.join(pods)}" if pods else "done"


def _disk_words(disk: dict[str, Any]) -> str:
    blobs, layers, writable = (size_words(disk[key]) for key in ("blobs", "layers", "writableLayers"))
    return f"{blobs} blobs of images, {layers} unpacked layers, {writable} writable layers"


def _heads(*names: str) -> list[Cell]:
    return [Cell(name, "bold") for name in names]


def _time(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
