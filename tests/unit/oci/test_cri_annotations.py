"""Which annotations an OCI runtime gets, and that a request cannot take the names by which it tells pods apart."""

from __future__ import annotations

import dataclasses

import pytest

from criserver.errors import InvalidArgumentError
from criserver.oci import cri_annotations
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.parse import container_config, pod_config

OWN = {"io.kubernetes.cri.sandbox-id": "another", "run.oci.handler": "wasm", "vendor.com/x": "1"}
POD = pod_config(
    cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="p", namespace="n", uid="u"), annotations=OWN, log_directory="/l"
    )
)
CONTAINER = container_config(
    cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image="i"), annotations={**OWN, "plain": "2"}
    ),
    POD,
)
NAMES = {
    "io.kubernetes.cri.sandbox-id": "s",
    "io.kubernetes.cri.sandbox-name": "p",
    "io.kubernetes.cri.sandbox-namespace": "n",
    "io.kubernetes.cri.sandbox-uid": "u",
}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], set()),
        (["run.oci.*"], {"run.oci.handler"}),
        (["*"], {"io.kubernetes.cri.sandbox-id", "run.oci.handler"}),
        (["*/*"], {"vendor.com/x"}),
        (["vendor.com/?", "run.oci.handle[a-r]"], {"vendor.com/x", "run.oci.handler"}),
        (["vendor.*"], set()),
    ],
)
def test_a_star_does_not_match_a_slash(patterns: list[str], names: set[str]) -> None:
    assert cri_annotations.passed(OWN, patterns).keys() == names


def test_a_container_is_told_with_what_both_patterns_let_pass() -> None:
    found = cri_annotations.of_container(CONTAINER, POD, "s", ["run.oci.*", "io.*"], ["plain"])
    assert found == {
        **NAMES,
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": "c",
        "io.kubernetes.cri.image-name": "i",
        "run.oci.handler": "wasm",
        "plain": "2",
    }


def test_a_sandbox_container_is_told_as_one() -> None:
    assert cri_annotations.of_sandbox(POD, "s", ["*"]) == {
        **NAMES,
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-log-directory": "/l",
        "run.oci.handler": "wasm",
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64k", 64 << 10), ("2Mi", 2 << 20), ("1GiB", 1 << 30), ("3mb", 3 << 20), (" 1g ", 1 << 30)],
)
def test_the_size_of_shared_memory(text: str, size: int) -> None:
    for name in cri_annotations.SHM_SIZES:
        pod = dataclasses.replace(POD, annotations={name: text})
        assert cri_annotations.shm_size(pod, [name]) == size
        assert cri_annotations.shm_size(pod, ["other"]) is None


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5g", "10%", "1t", "much", "9" * 19 + "g"])
def test_what_is_no_size_is_refused(text: str) -> None:
    pod = dataclasses.replace(POD, annotations={cri_annotations.SHM_SIZES[0]: text})
    with pytest.raises(InvalidArgumentError, match="ShmSize"):
        cri_annotations.shm_size(pod, ["*"])
