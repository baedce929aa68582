"""Any bytes as a manifest, an index or a configuration: the result is checked values, or a bounded error.

Bytes alone are hardly ever JSON that comes past the first look, so behind a zero byte they say what to change in a
document that is valid.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.images.manifests import (
    DOCKER_LAYER,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Configuration,
    Descriptor,
    Index,
    Manifest,
    chain_ids,
    check_layers,
    choose,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform

TYPES = ("", *MANIFEST_TYPES, *INDEX_TYPES, "application/json")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PLATFORM = Platform("linux", "amd64", "v3")
REFUSED = (InvalidArgumentError, NotFoundError, UnimplementedError)


def _descriptor(kind: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{'1' * 64}", "size": 7, **more}


VALID: tuple[dict[str, Any], ...] = (
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _descriptor(OCI_CONFIG),
        "layers": [_descriptor(OCI_LAYER_GZIP, annotations={"a": "b"}), _descriptor(DOCKER_LAYER)],
        "annotations": {"a": "b"},
    },
    {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            _descriptor(OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64", "variant": "v2"}),
            _descriptor(OCI_MANIFEST, platform={"os": "linux", "architecture": "arm64"}),
            _descriptor(OCI_INDEX, annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        ],
    },
    {
        "architecture": "amd64",
        "os": "linux",
        "variant": "v2",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{'2' * 64}", f"sha256:{'3' * 64}"]},
        "config": {
            "User": "1:2",
            "Env": ["A=b"],
            "Entrypoint": ["/a"],
            "Cmd": None,
            "WorkingDir": "/w",
            "Volumes": {"/v": {}},
            "ExposedPorts": {"80/tcp": {}},
            "Labels": {"a": "b"},
            "StopSignal": "SIGTERM",
        },
        "history": [{"created_by": "x", "empty_layer": True}],
    },
)
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 1e308, 2**63, "", "x", "x" * 5000, "\ud800", "\n", "/../..", [], {}, [None], {"": None}),
    *(f"sha256:{'4' * 64}", f"sha256:{'4' * 63}g", f"sha512:{'4' * 128}", *TYPES, DOCKER_LAYER, "linux", "arm", "v7"),
)
NAMES = sorted({"", "urls", "data", "artifactType", "subject", *(name for valid in VALID for name in valid)})


def check(data: bytes) -> None:
    """The first byte says whether a configuration or what type of manifest the rest is."""
    if not data:
        return
    kind, body = data[0], data[1:]
    if body.startswith(b"\0"):
        body = json.dumps(changed(VALID[2] if kind > 127 else VALID[kind // 16 % 2], iter(body[1:]))).encode()
    try:
        if kind > 127:
            check_configuration(parse_config(body, "it"))
        else:
            check_manifest(parse_manifest(body, TYPES[kind % len(TYPES)], "it"))
    except REFUSED as e:
        assert len(str(e)) < 1000
        assert str(e).isprintable()


def changed(valid: dict[str, Any], choices: Iterator[int]) -> dict[str, Any]:
    """A copy with changes: each is a way down, at each step a member or to stop there, and what is done at its end."""
    document = copy.deepcopy(valid)
    for step in choices:
        place: Any = document
        while (inner := _member(place, step)) is not None and isinstance(place[inner], dict | list) and place[inner]:
            step = next(choices, 255)
            if step == 255:
                break
            place = place[inner]
        what = next(choices, 0)
        odd = copy.deepcopy(ODD[what // 4 % len(ODD)])
        if inner is None:
            continue
        if what % 4 == 0:
            del place[inner]
        elif what % 4 == 1 and isinstance(place, list):
            place.append(odd)
        elif what % 4 == 1:
            place[NAMES[what // 4 % len(NAMES)]] = odd
        elif what % 4 == 2 and isinstance(place, list):
            place.append(copy.deepcopy(place[inner]))
        else:
            place[inner] = odd
    return document


def _member(place: dict[str, Any] | list[Any], number: int) -> Any:
    """The key or index of one of the members; None where there is none."""
    keys = list(place) if isinstance(place, dict) else range(len(place))
    return keys[number % len(keys)] if keys else None


def check_configuration(found: Configuration) -> None:
    assert all(DIGEST.fullmatch(diff_id) for diff_id in found.diff_ids)
    assert len(set(chain_ids(found.diff_ids))) == len(found.diff_ids)
    process = found.process
    texts = [process.user, process.working_dir, process.stop_signal, str(found.platform)]
    texts += [*process.env, *process.entrypoint, *process.cmd, *process.volumes]
    "".join(texts).encode()  # it is sent on as UTF-8


def check_manifest(found: Index | Manifest) -> None:
    if isinstance(found, Index):
        check_descriptor(choose(found, PLATFORM, "it"))
        return
    for descriptor in (found.config, *found.layers):
        check_descriptor(descriptor)
    check_layers(found, Configuration(PLATFORM, ("",) * len(found.layers), None), "it")  # type: ignore[arg-type]


def check_descriptor(descriptor: Descriptor) -> None:
    assert DIGEST.fullmatch(descriptor.digest)
    assert descriptor.size >= 0
    assert isinstance(descriptor.size, int)
    assert all(isinstance(value, str) for value in descriptor.annotations.values())
