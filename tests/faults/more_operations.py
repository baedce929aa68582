"""Operations that take more than each node has: a registry, a runtime for user namespaces, a criu for this kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from criserver.cli.client import method
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.faults.operations import ADMIN, LAYERS, Operation, fails, run_again, send
from tests.support.criu import criu_trouble
from tests.support.fixtures import RUNC
from tests.support.imagebuilder import build_image
from tests.support.node import Node
from tests.support.pods import userns
from tests.support.registry import Registry
from tests.support.waiting import SLOWNESS, eventually

# Of a checkpoint: longer than it takes, and short for one that hangs.
_CHECKPOINT_SECONDS = 4


def pushed(registry: Registry) -> str:
    """The name of an image in a registry."""
    return registry.push(build_image([{"p/a": os.urandom(300_000), "p/b": b"1"}, {"p/c": b"2"}]), "points:latest")


def more_operations(archive: str, image: str) -> list[Operation]:
    """The operations that are possible here. ``archive`` has an image to verify, ``image`` is one to pull, or ""."""
    found = [Operation("VerifyImages", lambda node: _load(node, archive), _verify, _verify)]
    if image:
        found.append(Operation("PullImage", lambda _: image, _pull, _pull))
    if RUNC:
        run = _in_user_namespace(lambda node, linux: node.run_pod("pod", handler="newer", linux=linux))
        again = _in_user_namespace(lambda node, linux: run_again(node, handler="newer", linux=linux))
        found.append(Operation("RunPodSandbox, user namespace", lambda _: "", run, again))
    if not criu_trouble():
        found.append(Operation("CheckpointContainer", _running, _checkpoint, _checkpoint_again))
    return found


def _load(node: Node, archive: str) -> str:
    send(node, archive)
    return ""


def _verify(node: Node, _: str) -> None:
    layers = 0
    for told in method(node.client.channel, ADMIN, "VerifyImages")(admin.VerifyImagesRequest(), timeout=60):
        assert not told.damage, told
        layers = told.layers
    assert layers > LAYERS


def _pull(node: Node, image: str) -> None:
    node.client.PullImage(image=cri.ImageSpec(image=image))


def _in_user_namespace(run: Callable[[Node, cri.LinuxPodSandboxConfig], object]) -> Callable[[Node, str], object]:
    def call(node: Node, _: str) -> object:
        linux = userns()
        # The pod's root writes it, in a helper process after the CNI plugins.
        linux.sysctls["net.ipv4.ip_forward"] = "1"
        return run(node, linux)

    return call


def _running(node: Node) -> str:
    return node.run(node.run_pod("pod"), "c", ["sleep", "1000"])


def _checkpoint(node: Node, container: str) -> None:
    location = Path(node.base, "checkpoint.tar")
    seconds = int(_CHECKPOINT_SECONDS * SLOWNESS)
    node.client.CheckpointContainer(container_id=container, location=str(location), timeout=seconds)
    location.unlink()


def _checkpoint_again(node: Node, container: str) -> None:
    """The container does not stay frozen, and nothing of the first archive stays."""
    run = partial(node.client.ExecSync, container_id=container, cmd=["true"], timeout=int(10 * SLOWNESS))
    eventually(lambda: not fails(run) and not list(Path(node.base).glob(".checkpoint-*")), told=lambda: fails(run))
    assert run().exit_code == 0
    _checkpoint(node, container)
