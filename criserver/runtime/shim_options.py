"""The options of a shim of containerd's kind: from their table in the configuration to the bytes that the shim takes.

containerd-shim-runc-v2 has a message of its own (containerd.runc.v1.Options). Other shims are given the table as TOML,
or the path of a file (runtimeoptions.v1.Options). The keys of the table are those of containerd's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from criserver.config.settings import dotted, toml_value
from criserver.errors import InvalidArgumentError
from shims import task_wire

_RUNC = "containerd.runc.v1.Options"
_OTHER = "runtimeoptions.v1.Options"
# The fields of containerd.runc.v1.Options: numbers and types.
_FIELDS: Mapping[str, tuple[int, type]] = {
    "NoPivotRoot": (1, bool),
    "NoNewKeyring": (2, bool),
    "ShimCgroup": (3, str),
    "IoUid": (4, int),
    "IoGid": (5, int),
    "BinaryName": (6, str),
    "CriuImagePath": (10, str),
    "CriuWorkPath": (11, str),
}


def is_runc(shim: str) -> bool:
    """Whether a shim, named or by its path, is containerd's shim for runc."""
    return shim == "io.containerd.runc.v2" or os.path.basename(shim) == "containerd-shim-runc-v2"


def check(shim: str, options: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError for options that the shim does not have, or that are the daemon's own to set."""
    if is_runc(shim):
        for key, value in options.items():
            if key not in _FIELDS:
                raise InvalidArgumentError(f"unknown key {key}; allowed: {', '.join(sorted(_FIELDS))}")
            if type(value) is not _FIELDS[key][1] or (isinstance(value, int) and value < 0):
                raise InvalidArgumentError(f"{key} = {value!r}; it must be of type {_FIELDS[key][1].__name__}")
        return
    for key in ("TypeUrl", "ConfigPath"):
        if not isinstance(options.get(key, ""), str):
            raise InvalidArgumentError(f"{key} = {options[key]!r}; it must be of type str")


def encoded(shim: str, options: Mapping[str, Any], *, root: str, systemd: bool) -> tuple[str, bytes]:
    """The type of a shim's options and their bytes, in protobuf's encoding; two empty ones where it has none.

    runc's ``root`` and whether it uses ``systemd`` for cgroups follow from the daemon.
    """
    if is_runc(shim):
        value = b""
        for key, (field, kind) in _FIELDS.items():
            if key in options:
                value += (task_wire.data if kind is str else task_wire.number)(field, options[key])
        return _RUNC, value + task_wire.data(7, root) + task_wire.number(9, systemd)
    if not options:
        return "", b""
    path = options.get("ConfigPath", "")
    value = task_wire.data(1, options.get("TypeUrl", "")) + task_wire.data(2, path)
    return _OTHER, value if path else value + task_wire.data(3, toml(options))


def toml(table: Mapping[str, Any]) -> str:
    """A table as a TOML document. Tables in it are inline tables."""
    return "".join(f"{dotted((key,))} = {toml_value(value)}\n" for key, value in table.items())
