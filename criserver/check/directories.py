"""The directories of images and pods: file systems, their options, and the space in them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config
from criserver.own_directories import ROOT, STATE, foreign

# The kubelet's defaults: below these shares of free space it removes images, and later evicts pods.
_SPACE, _INODES = 0.15, 0.05
# Bytes. The images of a node's own pods (network, proxy, DNS) take about one GiB, and are unpacked beside their blobs.
_SMALL = 4 << 30


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """The root and the state directory."""
    for directory, kind in ((config.root, ROOT), (config.state, STATE)):
        # Only root can look into the directories of a daemon.
        if host.privileged and (unfit := foreign(host.path(directory), kind, host.path(config.grpc_address))):
            fault, _, advice = unfit.partition("; ")
            yield missing(fault, advice)
            return
    root = host.nearest(config.root)
    mount = host.mount_of(root)
    where = f"root = {config.root}" + (f", on {mount.kind} ({mount.point})" if mount else "")
    if mount is not None and "ro" in mount.options:
        yield missing(f"{where}: it is read-only", "give root a writable directory on a local disk")
        return
    if host.privileged and (words := host.overlay(host.path(root))):
        yield missing(
            f"{where}: containers cannot have their file systems there: {words}",
            "load the module overlay (modprobe overlay), and give root a directory on a local ext4, xfs (ftype=1), "
            "btrfs or tmpfs",
        )
        return
    yield ok(f"{where}{': overlay works there' if host.privileged else ''}")
    if host.privileged and (words := host.idmap(host.path(root))):
        yield warning(
            f"{where}: no pods with user namespaces: {words}",
            "they need Linux 5.19 or newer with ext4, xfs or btrfs (tmpfs needs 6.3)",
        )
    yield from _room(host.path(root), config.root)
    state = host.mount_of(host.nearest(config.state))
    if state is not None and "ro" in state.options:
        yield missing(f"state = {config.state}: it is read-only", "give state a writable directory")
    elif state is not None and state.kind not in ("tmpfs", "ramfs"):
        yield warning(
            f"state = {config.state}, on {state.kind}: its contents survive a reboot, and are deleted only at the "
            "daemon's next start",
            "give state a directory on a tmpfs, as /run is with systemd",
        )
    else:
        yield ok(f"state = {config.state}")


def _room(path: str, name: str) -> Iterator[Finding]:
    room = os.statvfs(path)
    free = room.f_bavail / room.f_blocks if room.f_blocks else 1.0
    if free < _SPACE:
        yield warning(
            f"{name}: {free:.0%} of its file system is free ({room.f_bavail * room.f_frsize >> 20} MiB): the kubelet "
            f"removes images below {_SPACE:.0%}",
            "free some space, or give root a larger disk",
        )
    if room.f_blocks * room.f_frsize < _SMALL:
        yield warning(
            f"{name}: its file system has {room.f_blocks * room.f_frsize >> 20} MiB in all, which is little for images",
            f"give root a disk of {_SMALL >> 30} GiB or more",
        )
    inodes = room.f_favail / room.f_files if room.f_files else 1.0
    if inodes < _INODES:
        yield warning(
            f"{name}: {inodes:.0%} of its file system's inodes are free: the kubelet evicts pods below {_INODES:.0%}",
            "delete small files, or make the file system again with more inodes",
        )
