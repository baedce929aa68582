"""The file of a container's OCI spec, in its bundle."""

from __future__ import annotations

import json
import os

from criserver.errors import DataLossError
from criserver.oci.spec_inputs import Spec
from criserver.runtime.node import Node


def spec_path(node: Node, container_id: str) -> str:
    return os.path.join(node.container_dir(container_id), "config.json")


def write_spec(node: Node, container_id: str, document: Spec) -> None:
    """Write a container's spec in place of the last one. Blocks."""
    path = spec_path(node, container_id)
    with open(f"{path}.new", "w") as f:
        f.write(json.dumps(document))
    os.rename(f"{path}.new", path)


def spec_size(node: Node, container_id: str) -> int:
    """The bytes of a container's spec; 0 if it is gone."""
    try:
        return os.stat(spec_path(node, container_id)).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def read_spec(node: Node, container_id: str) -> Spec:
    """A container's spec. Blocks. Raises DataLossError if somebody has deleted or damaged it."""
    path = spec_path(node, container_id)
    try:
        with open(path) as f:
            document = json.load(f)
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:
        reason = "it is gone" if isinstance(e, OSError) else f"it is damaged ({e})"
        raise DataLossError(f"{path} cannot be used: {reason}; the container has to be made anew") from e
    if not isinstance(document, dict) or "process" not in document:
        raise DataLossError(f"{path} cannot be used: it has no process; the container has to be made anew")
    return document
