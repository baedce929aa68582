"""Which system calls a container may make: the OCI object ``linux.seccomp``.

The runtime's default is data, ``seccomp_default.toml``, with the reason for each group of calls in it. A profile of
the node's own is a JSON file in the form that Docker and Kubernetes use. Both are decided here for the capabilities
of one container, so that the OCI runtime gets rules without conditions.

OCI runtime specification 1.0.2 (config-linux.md, "Seccomp"); seccomp(2).
"""

from __future__ import annotations

import errno
import functools
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.text import quoted
from snapshotter import files

Seccomp = dict[str, Any]

MAX_PROFILE = 1 << 20

# Go's names whose capitals are not libseccomp's name.
_NATIVE = {"amd64": "X86_64", "386": "X86", "arm64": "AARCH64"}
# What a call gets that the table does not list.
_UNLISTED = "ENOSYS"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A node's architecture, and libseccomp's names of it and of those whose programs it runs as well."""

    name: str
    filter: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """Calls with one answer: allowed always, never, or with one of some capabilities; else they fail with ``errno``.

    ``architectures`` are the nodes that have these calls, empty for all.
    """

    name: str
    allow: str | tuple[str, ...]
    architectures: tuple[str, ...]
    errno: str
    reason: str
    source: str
    syscalls: tuple[str, ...]

    def allows(self, capabilities: Collection[str]) -> bool:
        """Whether a process that holds ``capabilities`` may make these calls."""
        if isinstance(self.allow, str):
            return self.allow == "always"
        return any(name in capabilities for name in self.allow)


@dataclass(frozen=True, slots=True)
class Filter:
    """A call that is decided by the low 32 bits of one argument: (mask, value) matches argument & mask == value."""

    syscall: str
    argument: int
    lifted_by: tuple[str, ...]
    reason: str
    source: str
    allowed: tuple[tuple[int, int], ...]
    refused: tuple[tuple[int, int], ...]
    errno: str


@functools.cache
def _data() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("criserver.oci").joinpath("seccomp_default.toml").read_text())


@functools.cache
def default_architectures() -> Mapping[str, Architecture]:
    """The architectures that the default is made for, by Go's name."""
    return {
        one["name"]: Architecture(name=one["name"], filter=tuple(one["filter"]), reason=one["reason"])
        for one in _data()["architecture"]
    }


@functools.cache
def default_table() -> tuple[tuple[Group, ...], tuple[Filter, ...]]:
    """The runtime's default as the data file has it."""
    document = _data()
    groups = tuple(
        Group(
            name=group["name"],
            allow=allow if isinstance(allow := group["allow"], str) else tuple(allow),
            architectures=tuple(group.get("architectures", ())),
            errno=group.get("errno", "EPERM"),
            reason=group["reason"],
            source=group["source"],
            syscalls=tuple(group["syscalls"].split()),
        )
        for group in document["group"]
    )
    filters = tuple(
        Filter(
            syscall=one["syscall"],
            argument=one["argument"],
            lifted_by=tuple(one.get("lifted_by", ())),
            reason=one["reason"],
            source=one["source"],
            allowed=tuple((mask, value) for mask, value in one["allowed"]),
            refused=tuple((mask, value) for mask, value in one["refused"]),
            errno=one["errno"],
        )
        for one in document["filter"]
    )
    return groups, filters


def default_profile(capabilities: Collection[str], architecture: str) -> Seccomp:
    """The runtime's default for a container whose bounding set is ``capabilities`` ("CAP_…") on ``architecture`` (Go).

    Raises UnimplementedError for an architecture whose system calls the default was not made for.
    """
    if architecture not in default_architectures():
        raise UnimplementedError(
            f"there is no default seccomp profile for {architecture}; give the pod a Localhost profile or Unconfined"
        )
    groups, filters = default_table()
    allowed: list[str] = []
    refused: dict[str, list[str]] = {}
    by_argument: list[Seccomp] = []
    for group in groups:
        if group.architectures and architecture not in group.architectures:
            continue
        if group.allows(capabilities):
            allowed += group.syscalls
        elif group.errno != _UNLISTED:
            refused.setdefault(group.errno, []).extend(group.syscalls)
    for one in filters:
        if any(name in capabilities for name in one.lifted_by):
            allowed.append(one.syscall)
        else:
            by_argument += _by_argument(one)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": getattr(errno, _UNLISTED),
        "architectures": list(default_architectures()[architecture].filter),
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            *(_refusal(names, code) for code, names in refused.items()),
            *by_argument,
        ],
    }


def localhost_profile(path: str, capabilities: Collection[str], architecture: str, kernel: str) -> Seccomp:
    """The profile in the file ``path`` for a container whose bounding set is ``capabilities``.

    ``path`` is CRI's localhost_ref, absolute; ``architecture`` is Go's name and ``kernel`` the release ("6.1.0-18"),
    which the file's conditions are compared with. Raises NotFoundError for a file that is not there, and
    InvalidArgumentError that names the file and the key.
    """
    if not path.startswith("/"):
        raise InvalidArgumentError(f"seccomp profile {path!r} must be an absolute path")
    return resolve(_read(path), f"seccomp profile {path}", capabilities, architecture, kernel)


def resolve(text: bytes, what: str, capabilities: Collection[str], architecture: str, kernel: str) -> Seccomp:
    """The OCI object for the profile in ``text``, with its conditions decided; ``what`` names it in errors.

    Parameters and errors as for :func:`localhost_profile`. A rule's ``includes`` must all hold and of its
    ``excludes`` none, which is Docker's meaning of them.
    """
    document = _document(text, what)
    profile: Seccomp = {"defaultAction": document["defaultAction"]}
    if (number := _errno(document, "defaultErrnoRet", "defaultErrno", what)) is not None:
        profile["defaultErrnoRet"] = number
    if architectures := _architectures(document, architecture, what):
        profile["architectures"] = architectures
    if document.get("flags"):
        profile["flags"] = document["flags"]
    profile["syscalls"] = [
        _rule(rule, f"{what}: key syscalls.{index}")
        for index, rule in enumerate(document.get("syscalls") or ())
        if _applies(rule, capabilities, architecture, _version(kernel))
    ]
    return profile


def _by_argument(one: Filter) -> list[Seccomp]:
    """A rule for each match: runtimes take several conditions on one argument for alternatives, but do not have to."""
    rules = []
    for mask, value in one.allowed:
        rules.append({"names": [one.syscall], "action": "SCMP_ACT_ALLOW", "args": [_masked(one.argument, mask, value)]})
    for mask, value in one.refused:
        rules.append({**_refusal([one.syscall], one.errno), "args": [_masked(one.argument, mask, value)]})
    return rules


def _masked(index: int, mask: int, value: int) -> Seccomp:
    return {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}


def _refusal(names: list[str], code: str) -> Seccomp:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": getattr(errno, code)}


def _read(path: str) -> bytes:
    try:
        return files.read(path, MAX_PROFILE)
    except FileNotFoundError as e:
        raise NotFoundError(f"seccomp profile {path} does not exist; install it on this node") from e
    except OSError as e:
        raise InvalidArgumentError(f"seccomp profile {path} cannot be read: {e.strerror}") from e


def _document(text: bytes, what: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidArgumentError(f"{what} is not valid JSON: {e}") from e
    # Said in words of its own: it is a documented feature, and the schema would only call it a wrong value.
    if isinstance(document, dict) and (document.get("listenerPath") or document.get("listenerMetadata")):
        raise InvalidArgumentError(
            f"{what}: key listenerPath: handing system calls to another program (SCMP_ACT_NOTIFY) is not supported"
        )
    for error in _validator().iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise InvalidArgumentError(f"{what}: key {key}: {error.message[:300]}")
    return dict(document)


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/seccomp.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _architectures(document: Mapping[str, Any], architecture: str, what: str) -> list[str]:
    listed, mapped = document.get("architectures") or [], document.get("archMap") or []
    if listed and mapped:
        raise InvalidArgumentError(f"{what}: keys architectures and archMap are both set; give one")
    native = f"SCMP_ARCH_{_NATIVE.get(architecture, architecture.upper())}"
    for entry in mapped:
        if entry["architecture"] == native:
            return [native, *(entry.get("subArchitectures") or ())]
    return list(listed)


def _applies(
    rule: Mapping[str, Any], capabilities: Collection[str], architecture: str, kernel: tuple[int, int]
) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if not all(name in capabilities for name in includes.get("caps") or ()):
        return False
    if any(name in capabilities for name in excludes.get("caps") or ()):
        return False
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    if "minKernel" in includes and kernel < _version(includes["minKernel"]):
        return False
    return "minKernel" not in excludes or kernel < _version(excludes["minKernel"])


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"([0-9]{1,9})\.([0-9]{1,9})(?![0-9])", release)
    if not found:
        raise InvalidArgumentError(f"kernel release {quoted(release)} does not begin with a version")
    return int(found[1]), int(found[2])


def _rule(rule: Mapping[str, Any], what: str) -> Seccomp:
    if ("name" in rule) == ("names" in rule):
        raise InvalidArgumentError(f"{what}: it must have either names or, as old profiles do, name")
    found: Seccomp = {"names": rule.get("names") or [rule["name"]], "action": rule["action"]}
    if (number := _errno(rule, "errnoRet", "errno", what)) is not None:
        found["errnoRet"] = number
    if rule.get("args"):
        found["args"] = rule["args"]
    return found


def _errno(table: Mapping[str, Any], number: str, name: str, what: str) -> int | None:
    """The error to return: its number, or its name ("EPERM"), which Podman's profiles have beside or instead of it."""
    if table.get(number) is not None:
        return int(table[number])
    if name not in table:
        return None
    value = getattr(errno, table[name], None)
    if not isinstance(value, int):
        raise InvalidArgumentError(f"{what}: key {name}: {table[name]!r} is not the name of an error")
    return value
