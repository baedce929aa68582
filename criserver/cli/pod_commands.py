"""``criserver pods``, ``ps``, ``inspect`` and ``pod remove``: the pods and containers of a running daemon.

Each function is one command. It gets the options and returns the exit code of the process. All raise CriError: with the
daemon's error if that refuses, NoAnswerError if it cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from criserver.cli.client import ADMIN, RUNTIME, as_json, connected, method
from criserver.cli.options import address
from criserver.cli.progress_display import short
from criserver.cli.table import Cell, duration_words, print_table
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

_POD_STATES = {cri.SANDBOX_READY: Cell("ready", "green"), cri.SANDBOX_NOTREADY: Cell("not ready", "yellow")}
_CONTAINER_STATES = {
    cri.CONTAINER_CREATED: Cell("created"),
    cri.CONTAINER_RUNNING: Cell("running", "green"),
    cri.CONTAINER_EXITED: Cell("exited", "yellow"),
    cri.CONTAINER_UNKNOWN: Cell("unknown", "red"),
}


def pods(options: argparse.Namespace) -> int:
    """Print a table of the pods, or their IDs, or JSON."""
    with connected(address(options)) as channel:
        found, containers = listed(channel)
    wanted = [p for p in found if options.namespace in (None, p.metadata.namespace)]
    if options.json or options.quiet:
        _print_for_programs(wanted, as_document=options.json)
        return 0
    running = {p.id: 0 for p in found}
    for container in containers:
        running[container.pod_sandbox_id] = running.get(container.pod_sandbox_id, 0) + is_running(container)
    rows: list[Sequence[str | Cell]] = [_heads("POD", "ID", "STATE", "RUNNING", "AGE", "ATTEMPT", "HANDLER")]
    for pod in sorted(wanted, key=lambda p: (p.metadata.namespace, p.metadata.name, p.created_at)):
        numbers = (str(running[pod.id]), _age(pod.created_at), str(pod.metadata.attempt))
        rows.append((pod_name(pod), short(pod.id), _POD_STATES[pod.state], *numbers, pod.runtime_handler or "-"))
    print_table(rows, keep=(1, 2, 3, 4))
    return 0


def ps(options: argparse.Namespace) -> int:
    """Print a table of the containers that run, or of all, or their IDs, or JSON."""
    with connected(address(options)) as channel:
        found, containers = listed(channel)
        names = {p.id: pod_name(p) for p in found}
        wanted = [c for c in containers if options.all or is_running(c)]
        if options.pod is not None:
            wanted = [c for c in wanted if _is_of(options.pod, c.pod_sandbox_id, names)]
        if options.json or options.quiet:
            _print_for_programs(wanted, as_document=options.json)
            return 0
        rows: list[Sequence[str | Cell]] = [_heads("CONTAINER", "POD", "ID", "STATE", "AGE", "ATTEMPT", "IMAGE")]
        for container in sorted(wanted, key=lambda c: (names.get(c.pod_sandbox_id, ""), c.created_at)):
            pod = names.get(container.pod_sandbox_id, short(container.pod_sandbox_id))
            numbers = (_age(container.created_at), str(container.metadata.attempt))
            image = container.image.user_specified_image or container.image.image
            state = _state(channel, container)
            rows.append((container.metadata.name, pod, short(container.id), state, *numbers, image))
    print_table(rows, keep=(2, 3, 4))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print all that the daemon knows of a pod or container, as JSON."""
    with connected(address(options)) as channel:
        found = method(channel, ADMIN, "Inspect")(admin.InspectRequest(id=options.id))
    print(json.dumps(json.loads(found.document), indent=2))
    return 0


def remove(options: argparse.Namespace) -> int:
    """End and remove a pod."""
    with connected(address(options)) as channel:
        removed = method(channel, ADMIN, "RemovePod")(admin.RemovePodRequest(id=options.id, force=options.force))
    for words in removed.left:
        print(f"warning: its network plugins did not clean up: {words}", file=sys.stderr)
    print(f"removed {removed.id}")
    return 0


def listed(channel: grpc.Channel) -> tuple[list[cri.PodSandbox], list[cri.Container]]:
    """All pods and all containers."""
    found = method(channel, RUNTIME, "ListPodSandbox")(cri.ListPodSandboxRequest()).items
    containers = method(channel, RUNTIME, "ListContainers")(cri.ListContainersRequest()).containers
    return list(found), list(containers)


def pod_name(pod: cri.PodSandbox) -> str:
    """NAMESPACE/NAME."""
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def is_running(container: cri.Container) -> bool:
    """Whether the container's process runs."""
    return bool(container.state == cri.CONTAINER_RUNNING)


def _is_of(pod: str, sandbox_id: str, names: Mapping[str, str]) -> bool:
    """Whether ``pod``, NAMESPACE/NAME or the beginning of an ID, means this sandbox."""
    return names.get(sandbox_id) == pod or ("/" not in pod and sandbox_id.startswith(pod))


def _state(channel: grpc.Channel, container: cri.Container) -> Cell:
    """The state, with the exit code of a container that has exited."""
    if container.state != cri.CONTAINER_EXITED:
        return _CONTAINER_STATES[container.state]
    try:
        status = method(channel, RUNTIME, "ContainerStatus")(cri.ContainerStatusRequest(container_id=container.id))
    except grpc.RpcError:
        return _CONTAINER_STATES[container.state]  # it was removed meanwhile
    code = status.status.exit_code
    words = f"exited {code}" + (" OOM" if status.status.reason == "OOMKilled" else "")
    return Cell(words, "red" if code else "yellow")


def _print_for_programs(found: Sequence[Any], *, as_document: bool) -> None:
    if as_document:
        print(json.dumps([as_json(item) for item in found], indent=2))
    else:
        print(*(item.id for item in found), sep="\n", end="\n" if found else "")


def _heads(*names: str) -> list[Cell]:
    return [Cell(name, "bold") for name in names]


def _age(created_at: int) -> str:
    return duration_words(time.time() - created_at / 1e9)
