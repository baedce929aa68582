"""Any bytes for a manifest, an index or a configuration: checked values, or a bounded error for a caller."""

from __future__ import annotations

import re

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.images.manifests import (
    INDEX_TYPES,
    MANIFEST_TYPES,
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


def check(data: bytes) -> None:
    """The first byte says whether a configuration or what type of manifest the rest is."""
    if not data:
        return
    kind, body = data[0], data[1:]
    try:
        if kind > 127:
            check_configuration(parse_config(body, "it"))
        else:
            check_manifest(parse_manifest(body, TYPES[kind % len(TYPES)], "it"))
    except REFUSED as e:
        assert len(str(e)) < 1000
        assert str(e).isprintable()


def check_configuration(found: Configuration) -> None:
    assert all(DIGEST.fullmatch(diff_id) for diff_id in found.diff_ids)
    assert len(set(chain_ids(found.diff_ids))) == len(found.diff_ids)
    process = found.process
    texts = [process.user, process.working_dir, process.stop_signal, str(found.platform)]
    texts += [*process.env, *process.entrypoint, *process.cmd, *process.volumes, *process.exposed_ports]
    texts += [*process.labels, *process.labels.values()]
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
