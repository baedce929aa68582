"""What the daemon is doing, and what uses the disk: the answers for `criserver status` and `criserver du`."""

from __future__ import annotations

import asyncio
import glob
import os
import threading
import time
from collections import defaultdict

from criserver import __version__, logs, work_under_way
from criserver.api.inspection import container_name
from criserver.images import Image
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.runtime.node import Node
from criserver.text import printable


def node_status(node: Node, *, stacks: bool) -> admin.NodeStatusResponse:
    """The daemon's state at this moment. The call that asks for it is not among the calls under way.

    With ``stacks`` it has what each thread and each task is doing.
    """
    return admin.NodeStatusResponse(
        version=__version__,
        uptime_seconds=time.monotonic() - node.began,
        pid=os.getpid(),
        root=node.config.root,
        state=node.config.state,
        calls=[
            admin.CallUnderWay(
                rpc=call.rpc,
                number=call.number,
                seconds=call.seconds,
                about={name: printable(value) for name, value in call.about.items()},
            )
            for call in logs.calls_under_way()
            if call.rpc != "NodeStatus"
        ],
        recovering=[
            f"{sandbox.config.namespace}/{sandbox.config.name}"
            for key in node.recovering
            if (sandbox := node.records.sandboxes.get(key)) is not None
        ],
        tasks=len(asyncio.all_tasks()),
        threads=threading.active_count(),
        disk=_totals(node),
        warnings=[
            admin.LastWarning(at=w.at, level=w.level, event=printable(w.event), fields=printable(w.fields))
            for w in logs.last_warnings()
        ],
        stacks=[
            admin.Stack(kind=stack.kind, name=printable(stack.name), at=stack.at)
            for stack in (work_under_way.stacks() if stacks else ())
        ],
    )


async def disk_use(node: Node) -> admin.DiskUseResponse:
    """What each image and each container occupies. The sizes of logs are read from the disk, by a thread."""
    containers = list(node.records.containers.values())
    names = {c.id: container_name(c, node.records.sandboxes[c.sandbox_id]) for c in containers}
    users = defaultdict(list)
    for container in containers:
        users[container.image_id].append(names[container.id])
    logs_of = await asyncio.to_thread(lambda: {c.id: _log_size(c.log_path) for c in containers})
    response = admin.DiskUseResponse(totals=_totals(node))
    for usage in node.images.usages():
        response.images.add(
            image=image_message(usage.image),
            pinned=usage.image.pinned,
            blobs=usage.blobs,
            layers=usage.layers,
            own=usage.own,
            users=sorted(users[usage.image.id]),
            used_since=min((c.created_at for c in containers if c.image_id == usage.image.id), default=0),
        )
    for container in containers:
        latest = node.stats.disk.latest(container.id)
        response.containers.add(
            id=container.id,
            name=names[container.id],
            writable_layer=latest.bytes if latest else 0,
            inodes=latest.inodes if latest else 0,
            measured_at=latest.timestamp if latest else 0,
            log=logs_of[container.id],
        )
    return response


def image_message(image: Image) -> admin.Image:
    """An image with its names."""
    return admin.Image(id=image.id, names=[*image.repo_tags, *image.repo_digests])


def _totals(node: Node) -> admin.DiskTotals:
    blobs = node.images.blob_bytes()
    room = os.statvfs(node.config.root)
    return admin.DiskTotals(
        blobs=blobs,
        layers=node.images.fs_usage().bytes - blobs,
        writable_layers=node.stats.disk.total().bytes,
        capacity=room.f_blocks * room.f_frsize,
        available=room.f_bavail * room.f_frsize,
    )


def _log_size(path: str) -> int:
    """The bytes of a container's log and of the rotated ones beside it, which have more at the end of their names."""
    size = 0
    for file in glob.glob(f"{glob.escape(path)}*") if path else ():
        try:
            size += os.stat(file, follow_symlinks=False).st_size
        except OSError:
            continue  # it was removed meanwhile
    return size
