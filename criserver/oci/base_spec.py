"""A handler's ``base_runtime_spec``: the OCI spec from which the specs of its containers start, as in containerd."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jsonschema

from criserver.errors import FailedPreconditionError
from criserver.oci.spec_inputs import Spec
from snapshotter import files

# Bytes.
_MAX_FILE = 1 << 20

# A base cannot set these. A container without them is unconfined, because the kubelet asked for that.
_SECURITY = {"process": ("apparmorProfile", "selinuxLabel"), "linux": ("seccomp", "mountLabel", "rootfsPropagation")}


def load(path: str) -> Spec:
    """The spec of a file. Blocks. Raises FailedPreconditionError for a file that cannot be used."""
    try:
        document: Spec = json.loads(files.read(path, _MAX_FILE))
    except OSError as e:
        raise FailedPreconditionError(f"base_runtime_spec {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise FailedPreconditionError(f"base_runtime_spec {path} is not valid JSON: {e}") from e
    for error in _validator().iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise FailedPreconditionError(f"base_runtime_spec {path}: key {key}: {error.message[:300]}; mend the file")
    for table, names in _SECURITY.items():
        for name in names:
            document.get(table, {}).pop(name, None)
    return document


def under(base: Mapping[str, Any], spec: Spec) -> Spec:
    """``spec`` with what only ``base`` has. Objects are merged key by key; a list of ``spec`` replaces that of base."""
    merged = {**base, **spec}
    for key, value in spec.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = under(base[key], value)
    return merged


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/base_spec.json").read_text())
    return jsonschema.Draft202012Validator(schema)
