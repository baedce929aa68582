"""Kubelets before 1.23: the daemon serves runtime.v1alpha2, with their messages as they are on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.node import Node


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def field(number: int, value: int | str | bytes) -> bytes:
    """One field (protobuf encoding): a number as a varint, all else by its length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data: bytes) -> dict[int, list[Any]]:
    """A message taken apart."""
    found: dict[int, list[Any]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 0x80:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            found.setdefault(key >> 3, []).append(number())
        else:
            size = number()
            found.setdefault(key >> 3, []).append(data[at : at + size])
            at += size
    return found


Call = Callable[..., dict[int, list[Any]]]


@pytest.fixture
def call(node: Node) -> Call:
    def call(method: str, request: bytes = b"") -> dict[int, list[Any]]:
        rpc: Any = node.client.channel.unary_unary(f"/runtime.v1alpha2.{method}")
        return fields(rpc(request, timeout=60))

    return call


def test_a_pods_life_as_a_kubelet_of_1_20_asks_for_it(node: Node, call: Call) -> None:
    version = call("RuntimeService/Version", field(1, "0.1.0"))
    assert version[2] == [b"criserver"]
    assert version[4] == [b"v1alpha2"]

    metadata = field(1, "old") + field(2, "uid-old") + field(3, "default")
    options = field(2, 1)  # NamespaceOption.pid = CONTAINER
    linux = field(2, field(1, options) + field(7, "unconfined"))  # with the old seccomp_profile_path
    config = field(1, metadata) + field(2, "old-host") + field(3, f"{node.logs}/old") + field(8, linux)
    pod = call("RuntimeService/RunPodSandbox", field(1, config))[1][0]
    assert isinstance(pod, bytes)

    container = (
        field(1, field(1, "c"))
        + field(2, field(1, "localhost/busybox:latest"))
        + b"".join(field(3, word) for word in ("sh", "-c", "echo $NAME; exec sleep 1000"))
        + field(6, field(1, "NAME") + field(2, "value"))
        + field(11, "c.log")
    )
    created = call("RuntimeService/CreateContainer", field(1, pod) + field(2, container) + field(3, config))[1][0]
    call("RuntimeService/StartContainer", field(1, created))
    listed = fields(call("RuntimeService/ListContainers")[1][0])
    assert listed[1] == [created]
    assert listed[6] == [1]  # CONTAINER_RUNNING
    answer = call("RuntimeService/ExecSync", field(1, created) + field(2, "hostname") + field(3, 30))
    assert answer[1] == [b"old-host\n"]
    call("RuntimeService/StopContainer", field(1, created))
    status = fields(call("RuntimeService/ContainerStatus", field(1, created))[1][0])
    assert status[3] == [2]  # CONTAINER_EXITED
    assert status[7] == [137]
    assert node.log(created.decode()) == "value\n"
    call("RuntimeService/StopPodSandbox", field(1, pod))
    call("RuntimeService/RemovePodSandbox", field(1, pod))
    assert call("RuntimeService/ListPodSandbox") == {}


def test_images(node: Node, call: Call) -> None:
    image = fields(call("ImageService/ImageStatus", field(1, field(1, "localhost/busybox:latest")))[1][0])
    assert image[2] == [b"localhost/busybox:latest"]
    assert len(call("ImageService/ListImages")[1]) >= 1
