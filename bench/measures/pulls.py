"""Pulls from a registry on the loopback interface, each by a fresh daemon with its root on a fresh disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.images import GZIP, ZSTD, archive, large_layer, small_layer
from bench.nodes import Containerd, Criserver
from bench.processes import memory, peak_memory, with_ended_children
from bench.registry import Registry
from bench.run import Run
from bench.table import FLOOR, OURS, PEER
from criserver.pb.runtime.v1 import api_pb2 as cri

_LAYERS = 4
_DEADLINE = 300.0


@dataclass(frozen=True)
class _Pull:
    seconds: float
    cpu: float
    peak: float = 0.0


def measure(run: Run) -> None:
    """Time and CPU of each image; then the peak of memory, in pulls of their own, because sampling takes time."""
    megabytes, files = run.sizes.pull_megabytes // _LAYERS, run.sizes.pull_files // _LAYERS
    images = {
        "large": (lambda n: large_layer(n, megabytes), *GZIP),
        "small": (lambda n: small_layer(n, files), *GZIP),
        "zstd": (lambda n: large_layer(n, megabytes), *ZSTD),
    }
    with run.place() as (directory, _), Registry(f"{directory}/registry") as registry:
        registry.push("tiny", lambda _: archive(iter([("hello", b"hello\n")])), 1, *GZIP)
        for image, (layer, pack, suffix) in images.items():
            registry.push(image, layer, _LAYERS, pack, suffix)
            for number, who in run.turns([FLOOR, OURS, PEER], warm_up=True):
                found = _pull(run, registry, who, image)
                if number:
                    run.add(f"pull-{image}", who, found.seconds)
                    run.add(f"pull-{image}-cpu", who, found.cpu)
            for who in (OURS, PEER):
                run.add(f"pull-{image}-memory", who, _pull(run, registry, who, image, sampled=True).peak)


def _pull(run: Run, registry: Registry, who: str, image: str, *, sampled: bool = False) -> _Pull:
    """One pull of an image by one contender."""
    with run.place() as (directory, root):
        if who == FLOOR:
            return _by_hand(registry, image, root)
        node = Criserver(directory, root, 1) if who == OURS else Containerd(directory, root, 2, run.containerd)
        with node:
            daemon = node.process.pid
            idle = memory(daemon)
            # A node has pulled before: the code of the first pull is loaded, and counts as memory only.
            node.client.PullImage(image=cri.ImageSpec(image=f"{registry.address}/tiny:latest"))
            time.sleep(0.3)
            with peak_memory(daemon, idle) if sampled else contextlib.nullcontext([0.0]) as peak:
                cpu, began = with_ended_children(daemon), time.monotonic()
                name = f"{registry.address}/{image}:latest"
                node.client.PullImage(deadline=_DEADLINE, image=cri.ImageSpec(image=name))
                seconds, cpu = time.monotonic() - began, with_ended_children(daemon) - cpu
            return _Pull(seconds, cpu, peak[0])


def _by_hand(registry: Registry, image: str, root: str) -> _Pull:
    """The same by hand: fetch, keep, decompress, digest twice and unpack all layers at once, by tools written in C."""
    unpack = "zstd -dc" if image == "zstd" else f"{sys.executable} -I -m isal.igzip -dc"
    began, before = time.monotonic(), os.times()
    running = []
    for number, url in enumerate(registry.layer_urls(image)):
        os.mkdir(f"{root}/{number}")
        line = f"""curl -fsS {url} | tee {root}/{number}.blob >(sha256sum >/dev/null) | {unpack} |
            tee >(sha256sum >/dev/null) | tar -x --numeric-owner -C {root}/{number}"""
        running.append(subprocess.Popen(["bash", "-o", "pipefail", "-c", line]))
    if any(status != 0 for status in [process.wait() for process in running]):
        raise RuntimeError("the floor failed")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return _Pull(time.monotonic() - began, cpu)
