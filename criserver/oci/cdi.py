"""The Container Device Interface: files by which device vendors say what a container needs to use a device.

``load`` reads the directories, ``resolve`` finds the edits for the devices that a container names, ``apply`` makes
them to its OCI spec. Container Device Interface specification 0.3.0 to 1.0.0 (SPEC.md).
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jsonschema
import structlog

from criserver.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from criserver.text import quoted
from snapshotter import files

Spec = dict[str, Any]
Stat = Callable[[str], os.stat_result]

# Ascending in priority.
DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
# Ascending. From 1.1.0 on a file may also want network devices moved, which needs a newer OCI runtime.
VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0")
ANNOTATION_PREFIX = "cdi.k8s.io/"
MAX_FILE = 4 << 20

_SUFFIXES = (".json", ".yaml")
_LABEL = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_DEVICE = r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?"
_KIND = re.compile(rf"(?=[^/]{{1,253}}/){_LABEL}/(?=[^=]{{1,63}}(?:=|\Z)){_LABEL}")
_QUALIFIED = re.compile(rf"(?P<kind>{_KIND.pattern})=(?P<device>{_DEVICE})")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """A device node to make at ``path``, as ``host_path`` is on the host; what is None or "" is taken from there.

    ``permissions`` are for the device cgroup: of "rwm", or "" for none.
    """

    path: str
    host_path: str
    kind: str
    major: int | None
    minor: int | None
    mode: int | None
    uid: int | None
    gid: int | None
    permissions: str


@dataclass(frozen=True, slots=True)
class Edits:
    """What is to be changed in a spec; ``mounts`` and ``hooks`` (by the hook's name) are OCI objects."""

    env: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    mounts: tuple[Mapping[str, Any], ...] = ()
    hooks: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    groups: tuple[int, ...] = ()
    intel_rdt: Mapping[str, Any] | None = None

    def __add__(self, other: Edits) -> Edits:
        """These and then ``other``."""
        return Edits(
            self.env + other.env,
            self.nodes + other.nodes,
            self.mounts + other.mounts,
            self.hooks + other.hooks,
            self.groups + other.groups,
            other.intel_rdt or self.intel_rdt,
        )


@dataclass(frozen=True, slots=True)
class File:
    """A CDI file: the edits for each of its devices by qualified name, and those for any of them.

    ``stamp`` tells one state of the file from another. A file with a ``fault`` has no devices.
    """

    path: str
    stamp: tuple[int, int, int]
    devices: Mapping[str, Edits] = field(default_factory=dict)
    common: Edits = Edits()
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """The files of ``directories``, and by a device's qualified name those of the highest directory that has it.

    More than one file for a name is a conflict: the device cannot be resolved.
    """

    directories: tuple[str, ...]
    files: tuple[File, ...]
    devices: Mapping[str, tuple[File, ...]]


def load(directories: Sequence[str] = DIRECTORIES, previous: Registry | None = None) -> Registry:
    """Read the CDI files of ``directories``, of which later ones override earlier ones.

    Files that are as they were in ``previous`` are not read again. A file that cannot be used is logged, and named
    where a device is not found; it does not hinder the others.
    """
    known = {f.path: f for f in previous.files} if previous else {}
    found: list[File] = []
    devices: dict[str, tuple[File, ...]] = {}
    for directory in directories:
        here = [_file(path, known.get(path)) for path in _scan(directory)]
        found += here
        names: dict[str, tuple[File, ...]] = {}
        for file in here:
            for name in file.devices:
                names[name] = (*names.get(name, ()), file)
        devices |= names
    return Registry(tuple(directories), tuple(found), devices)


def parse(name: str) -> tuple[str, str]:
    """The kind ("vendor.com/class") and the device of a qualified name. Raises InvalidArgumentError."""
    found = _QUALIFIED.fullmatch(name)
    if not found:
        raise InvalidArgumentError(f"CDI device {quoted(name)} is not of the form vendor.com/class=device")
    return found["kind"], found["device"]


def from_annotations(annotations: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that annotations name, as kubelets do that do not know CRI's field; by whatever names."""
    names: list[str] = []
    for key in sorted(annotations):
        if key.startswith(ANNOTATION_PREFIX):
            names += annotations[key].split(",")
    return tuple(names)


def resolve(names: Iterable[str], registry: Registry) -> Edits:
    """The edits for the devices ``names``, in their order: a file's common ones once, before its first device's.

    Raises InvalidArgumentError for a name that is malformed, and NotFoundError for devices that no file has or
    that two have, with where was looked.
    """
    edits = Edits()
    seen: set[str] = set()
    faults = []
    for name in dict.fromkeys(names):
        parse(name)
        found = registry.devices.get(name, ())
        if len(found) != 1:
            where = f"is in each of {', '.join(f.path for f in found)}" if found else "is in no file"
            faults.append(f"{name} {where}")
            continue
        file = found[0]
        if file.path not in seen:
            seen.add(file.path)
            edits += file.common
        edits += file.devices[name]
    if faults:
        unused = "".join(f"; {f.path} is not used: {f.fault}" for f in registry.files if f.fault)
        raise NotFoundError(
            f"CDI devices cannot be resolved: {', '.join(faults)} (looked in {', '.join(registry.directories)}{unused})"
        )
    return edits


def apply(spec: Spec, edits: Edits, stat_of: Stat = os.stat) -> Spec:
    """``spec`` with ``edits`` made; it is not changed itself, and doing it twice is as good as once.

    ``stat_of`` tells of device nodes of the host. A node that the file gives no owner belongs to the container's
    user, who could not open it otherwise, and for root is as on the host. Raises FailedPreconditionError for a
    device that the host does not have.
    """
    process, linux = dict(spec["process"]), dict(spec["linux"])
    found = {**spec, "process": process, "linux": linux}
    if edits.env:
        process["env"] = _environment(process.get("env", ()), edits.env)
    if edits.groups:
        user = process["user"]
        groups = dict.fromkeys((*user.get("additionalGids", ()), *(g for g in edits.groups if g)))
        process["user"] = {**user, "additionalGids": list(groups)}
    if edits.nodes:
        _add_nodes(process["user"], linux, edits.nodes, stat_of)
    if edits.mounts:
        replaced = {_normal(m["destination"]) for m in edits.mounts}
        last = {_normal(m["destination"]): dict(m) for m in edits.mounts}
        mounts = [m for m in spec.get("mounts", ()) if _normal(m["destination"]) not in replaced]
        # A mount must come after those that it is made upon.
        found["mounts"] = sorted([*mounts, *last.values()], key=lambda m: _normal(m["destination"]).count("/"))
    if edits.hooks:
        hooks = {name: list(listed) for name, listed in spec.get("hooks", {}).items()}
        for name, hook in edits.hooks:
            if hook not in hooks.setdefault(name, []):
                hooks[name].append(dict(hook))
        found["hooks"] = hooks
    if edits.intel_rdt is not None:
        linux["intelRdt"] = dict(edits.intel_rdt)
    return found


def _environment(lines: Iterable[str], more: Iterable[str]) -> list[str]:
    by_name = {line.partition("=")[0]: line for line in lines}
    by_name |= {line.partition("=")[0]: line for line in more}
    return list(by_name.values())


def _add_nodes(user: Mapping[str, Any], linux: Spec, nodes: Iterable[Node], stat_of: Stat) -> None:
    devices = {_normal(d["path"]): d for d in linux.get("devices", ())}
    limits = dict(linux.get("resources", {}))
    rules = list(limits.get("devices", ()))
    for node in nodes:
        device = _device(node, user, stat_of)
        devices.pop(_normal(node.path), None)
        devices[_normal(node.path)] = device
        if device["type"] != "p" and node.permissions:
            numbers = {key: device[key] for key in ("type", "major", "minor")}
            rule = {"allow": True, **numbers, "access": node.permissions}
            if rule not in rules:
                rules.append(rule)
    linux["devices"] = list(devices.values())
    linux["resources"] = {**limits, "devices": rules}


def _device(node: Node, user: Mapping[str, Any], stat_of: Stat) -> Spec:
    """The OCI device; a file that gives type and number need not have the node on the host."""
    given = node.kind == "p" or (node.kind and node.major is not None)
    device: Spec = {"path": node.path, "type": node.kind}
    if node.major is not None:
        device |= {"major": node.major, "minor": node.minor or 0}
    try:
        host = stat_of(node.host_path)
    except OSError as e:
        if not given:
            raise FailedPreconditionError(
                f"CDI device {node.path}: {node.host_path} of the host: {e.strerror}; is the device's driver loaded?"
            ) from e
        owner: dict[str, int] = {}
    else:
        owner = {"fileMode": stat.S_IMODE(host.st_mode), "uid": host.st_uid, "gid": host.st_gid}
        if not given:
            device |= _numbers(node, host)
    if user.get("uid"):
        owner["uid"] = user["uid"]
    if user.get("gid"):
        owner["gid"] = user["gid"]
    wanted = {"fileMode": node.mode, "uid": node.uid, "gid": node.gid}
    return {**device, **owner, **{key: value for key, value in wanted.items() if value is not None}}


def _numbers(node: Node, host: os.stat_result) -> Spec:
    kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}.get(stat.S_IFMT(host.st_mode), "")
    if not kind or node.kind not in ("", kind):
        wanted = {"c": "character device", "b": "block device"}.get(node.kind, "device")
        raise FailedPreconditionError(f"CDI device {node.path}: {node.host_path} of the host is no {wanted}")
    if kind == "p":
        return {"type": kind}
    return {"type": kind, "major": os.major(host.st_rdev), "minor": os.minor(host.st_rdev)}


def _normal(path: str) -> str:
    return os.path.normpath(path).rstrip("/")


class _FaultError(Exception):
    """A file cannot be used; the message says why."""


def _scan(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(e.path for e in entries if e.name.endswith(_SUFFIXES) and not e.is_dir())
    except FileNotFoundError:
        return []
    except OSError as e:
        log.warning("CDI directory cannot be read", path=directory, reason=e.strerror)
        return []


def _file(path: str, previous: File | None) -> File:
    try:
        found = os.stat(path)
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        stamp = (0, 0, 0)
    if previous and previous.stamp == stamp:
        return previous
    try:
        return _parsed(path, stamp)
    except _FaultError as e:
        log.warning("CDI file passed over", path=path, reason=str(e))
        return File(path, stamp, fault=str(e))


def _parsed(path: str, stamp: tuple[int, int, int]) -> File:
    try:
        text = files.read(path, MAX_FILE)
    except OSError as e:
        raise _FaultError(f"it cannot be read: {e.strerror}") from e
    document = _yaml(text) if path.endswith(".yaml") else _json(text)
    _check(document)
    devices: dict[str, Edits] = {}
    for index, device in enumerate(document["devices"]):
        name = f"{document['kind']}={device['name']}"
        if not _QUALIFIED.fullmatch(name):
            raise _FaultError(f"key devices.{index}.name: {quoted(device['name'])} is not the name of a device")
        if name in devices:
            raise _FaultError(f"key devices.{index}.name: {quoted(device['name'])} is there twice")
        devices[name] = _edits(device.get("containerEdits", {}))
    return File(path, stamp, devices, _edits(document.get("containerEdits", {})))


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _FaultError(f"it is not valid JSON: {e}") from e


def _yaml(text: bytes) -> Any:
    import yaml  # here: most nodes have no CDI files

    try:
        return yaml.load(text, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise _FaultError(f"it is not valid YAML: {e}") from e


def _check(document: Any) -> None:
    # First, because what a later version has added would be told as unknown keys.
    version = document.get("cdiVersion") if isinstance(document, dict) else None
    if isinstance(version, str) and version not in VERSIONS:
        raise _FaultError(f"key cdiVersion: {quoted(version)} is not one of {', '.join(VERSIONS)}")
    for error in _validator().iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise _FaultError(f"key {key}: {error.message[:300]}")
    if not _KIND.fullmatch(document["kind"]):
        raise _FaultError(f"key kind: {quoted(document['kind'])} is not of the form vendor.com/class")
    version_needed, feature = _needed(document)
    if VERSIONS.index(document["cdiVersion"]) < VERSIONS.index(version_needed):
        raise _FaultError(f"key cdiVersion: {version} does not have {feature}, which {version_needed} brought")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/cdi.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _needed(document: Mapping[str, Any]) -> tuple[str, str]:
    """The version that the file must at least declare, and what for (specification, "Released versions")."""
    parts = [document, *document["devices"]]
    edits = [part.get("containerEdits", {}) for part in parts]
    uses = (
        ("0.7.0", "intelRdt", any("intelRdt" in e for e in edits)),
        ("0.7.0", "additionalGids", any("additionalGids" in e for e in edits)),
        ("0.6.0", "annotations", any("annotations" in part for part in parts)),
        ("0.6.0", "a dot in the class", "." in document["kind"].partition("/")[2]),
        ("0.5.0", "hostPath", any("hostPath" in node for e in edits for node in e.get("deviceNodes", ()))),
        ("0.5.0", "a device's name with a digit first", any(d["name"][:1].isdigit() for d in document["devices"])),
        ("0.4.0", "a mount's type", any("type" in mount for e in edits for mount in e.get("mounts", ()))),
    )
    return next(((version, feature) for version, feature, used in uses if used), (VERSIONS[0], ""))


def _edits(table: Mapping[str, Any]) -> Edits:
    return Edits(
        env=tuple(table.get("env", ())),
        nodes=tuple(_node(node) for node in table.get("deviceNodes", ())),
        mounts=tuple(_mount(mount) for mount in table.get("mounts", ())),
        hooks=tuple(
            (hook["hookName"], {key: value for key, value in hook.items() if key != "hookName"})
            for hook in table.get("hooks", ())
        ),
        groups=tuple(table.get("additionalGids", ())),
        intel_rdt=table.get("intelRdt"),
    )


def _node(node: Mapping[str, Any]) -> Node:
    kind, permissions = node.get("type", ""), node.get("permissions") or "rwm"
    mode = node.get("fileMode")
    return Node(
        path=node["path"],
        host_path=node.get("hostPath") or node["path"],
        # To the kernel an unbuffered character device is a character device.
        kind="c" if kind == "u" else kind,
        major=node.get("major"),
        minor=node.get("minor"),
        mode=None if mode is None else stat.S_IMODE(mode),
        uid=node.get("uid"),
        gid=node.get("gid"),
        permissions="" if permissions == "none" else permissions,
    )


def _mount(mount: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OCI mount. What names no file system is a bind mount, also where a file of 0.3.0 has no options."""
    kind, options = mount.get("type", ""), list(mount.get("options", ()))
    if kind in ("", "bind", "none") and not {"bind", "rbind"} & set(options):
        options = ["rbind", *options]
    return {
        "destination": mount["containerPath"],
        "type": kind or "bind",
        "source": mount["hostPath"],
        "options": options,
    }
