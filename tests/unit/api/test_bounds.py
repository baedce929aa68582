"""The bounds of every request, of any type."""

from __future__ import annotations

import os
from typing import Any

import pytest
from google.protobuf.message import Message

from criserver.api import bounds
from criserver.errors import InvalidArgumentError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

ARGUMENT = 32 * os.sysconf("SC_PAGE_SIZE") - 1


def container(**fields: Any) -> cri.CreateContainerRequest:
    return cri.CreateContainerRequest(config=cri.ContainerConfig(**fields))


def pod(**fields: Any) -> cri.RunPodSandboxRequest:
    return cri.RunPodSandboxRequest(config=cri.PodSandboxConfig(**fields))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (container(log_path="a\nb"), "config.log_path has a control character"),
        (container(log_path="a\0b"), "config.log_path has a zero byte"),
        (container(mounts=[cri.Mount(), cri.Mount(host_path="/a\0")]), r"config.mounts\[1\].host_path has a zero byte"),
        (container(args=["a", "b\0"]), r"config.args\[1\] has a zero byte"),
        (container(args=["a" * (ARGUMENT + 1)]), f"at most {ARGUMENT} are allowed"),
        (container(envs=[cri.KeyValue(key="K", value=b"v" * ARGUMENT)]), r"config.envs\[0\] has \d+ bytes"),
        (container(envs=[cri.KeyValue(key="K", value=b"\0")]), r"config.envs\[0\].value has a zero byte"),
        (container(labels={"k\0": "v"}), "config.labels: the key"),
        (container(labels={"k": "v\0"}), r"config.labels\['k'\] has a zero byte"),
        (container(annotations={"k\n": "v"}), "config.annotations: the key"),
        (container(args=["x" * 100_000] * 63), "command, args and envs need"),
        (container(metadata=cri.ContainerMetadata(name="ж" * 2049)), "config.metadata.name has 4098 bytes"),
        (pod(metadata=cri.PodSandboxMetadata(uid="u" * (1 << 20))), "config.metadata.uid has 1048576 bytes"),
        (pod(linux=cri.LinuxPodSandboxConfig(sysctls={"net.a": "1" * 4096})), "has 4096 bytes; at most 4095"),
        (pod(linux=cri.LinuxPodSandboxConfig(cgroup_parent="/a\nb")), "cgroup_parent has a control character"),
        (cri.ExecSyncRequest(cmd=["x"] * 1_000_000), "cmd need 10000000 bytes"),
        (cri.ListContainersRequest(filter=cri.ContainerFilter(label_selector={"k": "\0"})), "label_selector"),
        (admin.PullImageRequest(name="i", password="p\0"), "password has a zero byte"),
    ],
)
def test_a_request_that_is_refused(request_: Message, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        bounds.check(request_)


@pytest.mark.parametrize(
    "request_",
    [
        container(command=["sh", "-c", "a\nb"], args=["a" * ARGUMENT], log_path="c/0", working_dir="/" + "x" * 4000),
        container(envs=[cri.KeyValue(key="K", value=b"line\nline")], annotations={"k": "a\0\n" + "v" * 200_000}),
        container(args=["x" * 100_000] * 62),
        pod(metadata=cri.PodSandboxMetadata(name="n" * 253, namespace="n" * 63, uid="u")),
        cri.PullImageRequest(auth=cri.AuthConfig(password="p" * 60_000)),
        cri.VersionRequest(),
    ],
)
def test_what_kubernetes_and_the_kernel_allow(request_: Message) -> None:
    bounds.check(request_)


def test_every_rule_is_of_a_field_that_there_is() -> None:
    """A name that CRI changes would silently be held to the default."""
    messages = {**cri.DESCRIPTOR.message_types_by_name, **admin.DESCRIPTOR.message_types_by_name}
    for name in bounds._RULES:
        message, _, field = name.partition(".")
        assert field in messages[message].fields_by_name, name
