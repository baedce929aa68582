"""One CDI file: reading it, checking it, and its devices with their edits."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jsonschema
import structlog

from criserver.errors import disk_fault, exhaustion
from criserver.oci.cdi_edits import CdiDeviceNode, ContainerEdits
from criserver.text import quoted
from snapshotter import files

# Ascending.
VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
# Keys whose values are no text: a YAML file may have a number as any other value, such as `name: 0`.
_NO_TEXT = frozenset({"major", "minor", "fileMode", "uid", "gid", "additionalGids", "timeout"})
_NO_TEXT |= {"enableCMT", "enableMBM", "enableMonitoring", "cdiVersion", "kind"}
MAX_FILE = 4 << 20

_LABEL = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_DEVICE = r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?"
_KIND = re.compile(rf"(?=[^/]{{1,253}}/){_LABEL}/(?=[^=]{{1,63}}(?:=|\Z)){_LABEL}")
QUALIFIED_NAME = re.compile(rf"(?P<kind>{_KIND.pattern})=(?P<device>{_DEVICE})")
"""A device's qualified name: vendor.com/class=device."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CdiFile:
    """A CDI file: the edits of each device by its qualified name, and the ``common`` edits for all its devices.

    ``stamp`` changes when the file changes. A file with a ``fault`` has no devices. ``lack`` is the error of a fault
    that may be over soon.
    """

    path: str
    stamp: tuple[int, int, int]
    devices: Mapping[str, ContainerEdits] = field(default_factory=dict)
    common: ContainerEdits = field(default_factory=ContainerEdits)
    fault: str = ""
    lack: OSError | None = None


# The stamp of no file.
_NEVER = (-1, -1, -1)


class _CdiFileError(Exception):
    """A file cannot be used; the message has the reason."""


def read_file(path: str, previous: CdiFile | None) -> CdiFile:
    """The file at ``path``, or ``previous`` where it has not changed. An unusable file is logged, and has a fault."""
    try:
        info = os.stat(path)
        stamp = (info.st_ino, info.st_size, info.st_ctime_ns)  # a change of the mode counts too
    except OSError:
        stamp = (0, 0, 0)
    if previous and previous.stamp == stamp:
        return previous
    lack: OSError | None = None
    try:
        return _parsed(path, stamp)
    except OSError as e:
        reason = f"it cannot be read: {e.strerror}"
        if exhaustion(e) or disk_fault(e):
            stamp = _NEVER  # the file is read again at the next use
            lack = e.with_traceback(None)  # the frames of the traceback would be kept with the file
    except _CdiFileError as e:
        reason = str(e)
    log.warning("CDI file ignored", path=path, reason=reason)
    return CdiFile(path, stamp, fault=reason, lack=lack)


def _parsed(path: str, stamp: tuple[int, int, int]) -> CdiFile:
    text = files.read(path, MAX_FILE)
    document = _without_null(_with_texts(_yaml(text), "") if path.endswith(".yaml") else _json(text))
    _check(document)
    devices: dict[str, ContainerEdits] = {}
    for index, device in enumerate(document["devices"]):
        name = f"{document['kind']}={device['name']}"
        if not QUALIFIED_NAME.fullmatch(name):
            raise _CdiFileError(f"key devices.{index}.name: {quoted(device['name'])} is not the name of a device")
        if name in devices:
            raise _CdiFileError(f"key devices.{index}.name: {quoted(device['name'])} is there twice")
        devices[name] = _edits(device.get("containerEdits", {}))
    return CdiFile(path, stamp, devices, _edits(document.get("containerEdits", {})))


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _CdiFileError(f"it is not valid JSON: {e}") from e


def _yaml(text: bytes) -> Any:
    import yaml  # imported here: most nodes have no CDI files

    try:
        return yaml.load(text, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise _CdiFileError(f"it is not valid YAML: {e}") from e


def _with_texts(value: Any, key: str) -> Any:
    """The value of a YAML file with texts where the specification has texts, as the specification's own library."""
    if isinstance(value, dict):
        return {name: _with_texts(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_texts(inner, key) for inner in value]
    if key in _NO_TEXT or not isinstance(value, int | float):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_null(value: Any) -> Any:
    """The value without keys that are null: for Go, which writes such files, these are not set."""
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _check(document: Any) -> None:
    # First, because keys of a later version would be reported as unknown keys.
    version = document.get("cdiVersion") if isinstance(document, dict) else None
    if isinstance(version, str):
        version = document["cdiVersion"] = version.removeprefix("v")
        if version not in VERSIONS:
            raise _CdiFileError(f"key cdiVersion: {quoted(version)} is not one of {', '.join(VERSIONS)}")
    for error in _validator().iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise _CdiFileError(f"key {key}: {error.message[:300]}")
    if not _KIND.fullmatch(document["kind"]):
        raise _CdiFileError(f"key kind: {quoted(document['kind'])} is not of the form vendor.com/class")
    least_version, feature = _least_version(document)
    if VERSIONS.index(document["cdiVersion"]) < VERSIONS.index(least_version):
        raise _CdiFileError(f"key cdiVersion: {version} does not have {feature}; it needs {least_version}")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/cdi.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _least_version(document: Mapping[str, Any]) -> tuple[str, str]:
    """The lowest version for the file, and the feature that needs it (specification, "Released versions")."""
    parts = [document, *document["devices"]]
    edits = [part.get("containerEdits", {}) for part in parts]
    rdt = [e.get("intelRdt", {}) for e in edits]
    uses = (
        ("1.1.0", "netDevices", any("netDevices" in e for e in edits)),
        ("1.1.0", "schemata or enableMonitoring", any({"schemata", "enableMonitoring"} & r.keys() for r in rdt)),
        ("0.7.0", "intelRdt", any("intelRdt" in e for e in edits)),
        ("0.7.0", "additionalGids", any("additionalGids" in e for e in edits)),
        ("0.6.0", "annotations", any("annotations" in part for part in parts)),
        ("0.6.0", "a dot in the class", "." in document["kind"].partition("/")[2]),
        ("0.5.0", "hostPath", any("hostPath" in node for e in edits for node in e.get("deviceNodes", ()))),
        ("0.5.0", "a device's name with a digit first", any(d["name"][:1].isdigit() for d in document["devices"])),
        ("0.4.0", "a mount's type", any("type" in mount for e in edits for mount in e.get("mounts", ()))),
    )
    return next(((version, feature) for version, feature, used in uses if used), (VERSIONS[0], ""))


def _edits(table: Mapping[str, Any]) -> ContainerEdits:
    return ContainerEdits(
        env=tuple(table.get("env", ())),
        nodes=tuple(_node(node) for node in table.get("deviceNodes", ())),
        mounts=tuple(_mount(mount) for mount in table.get("mounts", ())),
        hooks=tuple(
            (hook["hookName"], {key: value for key, value in hook.items() if key != "hookName"})
            for hook in table.get("hooks", ())
        ),
        groups=tuple(table.get("additionalGids", ())),
        intel_rdt=table.get("intelRdt"),
        net_devices=tuple((one["hostInterfaceName"], one["name"]) for one in table.get("netDevices", ())),
    )


def _node(node: Mapping[str, Any]) -> CdiDeviceNode:
    kind, permissions = node.get("type", ""), node.get("permissions") or "rwm"
    mode = node.get("fileMode")
    return CdiDeviceNode(
        path=node["path"],
        host_path=node.get("hostPath") or node["path"],
        # For the kernel, an unbuffered character device is a character device.
        kind="c" if kind == "u" else kind,
        major=node.get("major"),
        minor=node.get("minor"),
        mode=None if mode is None else stat.S_IMODE(mode),
        uid=node.get("uid"),
        gid=node.get("gid"),
        permissions="" if permissions == "none" else permissions,
    )


def _mount(mount: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OCI mount. A mount without a type is a bind mount; a file of 0.3.0 may have no options for it."""
    kind, options = mount.get("type", ""), list(mount.get("options", ()))
    if kind in ("", "bind", "none") and not {"bind", "rbind"} & set(options):
        options = ["rbind", *options]
    return {
        "destination": mount["containerPath"],
        "type": kind or "bind",
        "source": mount["hostPath"],
        "options": options,
    }
