"""Records as CRI messages."""

from __future__ import annotations

from typing import Any

import pytest

from criserver.api import views
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import ContainerState, SandboxState
from tests.support import records

POD = records.sandbox("pod")
ID = "sha256:" + "a" * 64


def status(number: int = 15, *, image: str = ID, specified: str = "", **fields: Any) -> cri.ContainerStatus:
    """The status of a container of this image."""
    sent = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="c"),
        image=cri.ImageSpec(image=image, user_specified_image=specified),
        **fields,
    )
    return views.container_status(records.container("c", POD, ContainerState.CREATED, sent=sent, stop_signal=number))


@pytest.mark.parametrize(
    ("specified", "shown"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("registry.example/a:1", "registry.example/a:1"),
        ("registry.example/a:1@sha256:" + "b" * 64, "registry.example/a@sha256:" + "b" * 64),
        # Not a name: shown as it is.
        ("b" * 64, "b" * 64),
        (ID, ID),
        ("", ID),
    ],
)
def test_a_status_names_the_image_as_the_pod_does_and_not_by_its_id(specified: str, shown: str) -> None:
    image = status(specified=specified).image
    assert (image.image, image.user_specified_image) == (shown, specified)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (15, cri.SIGTERM),
        (6, cri.SIGABRT),
        (17, cri.SIGCHLD),
        (29, cri.SIGIO),
        (34, cri.SIGRTMIN),
        (37, cri.SIGRTMINPLUS3),
        (50, cri.SIGRTMAXMINUS14),
        (64, cri.SIGRTMAX),
        # The C library keeps it for itself, and CRI has no name for it.
        (32, cri.RUNTIME_DEFAULT),
    ],
)
def test_a_status_has_the_signal_that_a_stop_sends(number: int, shown: int) -> None:
    assert status(number).stop_signal == shown


def test_a_signal_of_the_kubelet_keeps_its_name() -> None:
    assert status(6, stop_signal=cri.SIGIOT).stop_signal == cri.SIGIOT


@pytest.mark.parametrize(
    ("state", "shown"), [(SandboxState.READY, ["10.0.0.2", "fd00::2"]), (SandboxState.NOT_READY, [""])]
)
def test_a_pod_has_its_addresses_until_it_is_stopped(state: SandboxState, shown: list[str]) -> None:
    network = views.sandbox_status(records.sandbox("pod", state, ips=("10.0.0.2", "fd00::2"))).network
    assert [network.ip, *(extra.ip for extra in network.additional_ips)] == shown
