"""The system calls that a container may make: the OCI object ``linux.seccomp``.

The default profile is data: ``seccomp_default.toml`` has the reason for each group of calls. A profile of the node is a
JSON file in the format of Docker and Kubernetes. The conditions of both are evaluated here, for the capabilities of one
container. So the OCI runtime gets rules without conditions.

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

# Go's names of architectures whose upper case is not libseccomp's name.
_NATIVE = {"amd64": "X86_64", "386": "X86", "arm64": "AARCH64"}
# The error of a call that the table does not list.
_UNLISTED = "ENOSYS"
# A program answers the call (seccomp_unotify(2)). The OCI runtime connects to its socket, listenerPath.
_NOTIFY = "SCMP_ACT_NOTIFY"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A node's architecture. ``filter`` has libseccomp's names of it, and of others whose programs it can run."""

    name: str
    filter: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """Calls with one rule: allowed always, never, or with one of several capabilities. Else they fail with ``errno``.

    ``architectures`` are those that have these calls, empty for all.
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
    """A call whose rule depends on the low 32 bits of one argument: (mask, value) is argument & mask == value."""

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
    """The architectures of the default profile, by Go's name."""
    return {
        one["name"]: Architecture(name=one["name"], filter=tuple(one["filter"]), reason=one["reason"])
        for one in _data()["architecture"]
    }


@functools.cache
def default_table() -> tuple[tuple[Group, ...], tuple[Filter, ...]]:
    """The default profile as it is in the data file."""
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
    """The default profile for a container with the bounding set ``capabilities`` ("CAP_…") on ``architecture`` (Go).

    Raises UnimplementedError for an architecture that the default profile does not have.
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
    """The profile in the file ``path`` for a container with the bounding set ``capabilities``.

    ``path`` is CRI's localhost_ref, absolute. The conditions of the file use ``architecture`` (Go's name) and
    ``kernel``, the release ("6.1.0-18"). Raises NotFoundError for a missing file, and InvalidArgumentError that names
    the file and the key.
    """
    if not path.startswith("/"):
        raise InvalidArgumentError(f"seccomp profile {path!r} must be an absolute path")
    return resolve(_read(path), f"seccomp profile {path}", capabilities, architecture, kernel)


def resolve(text: bytes, profile_name: str, capabilities: Collection[str], architecture: str, kernel: str) -> Seccomp:
    """The OCI object for the profile in ``text``; ``profile_name`` is its name in errors.

    Parameters and errors are those of :func:`localhost_profile`. A rule applies where all of its ``includes`` hold and
    none of its ``excludes``, as in Docker.
    """
    document = _document(text, profile_name)
    profile: Seccomp = {"defaultAction": document["defaultAction"]}
    if (number := _errno(document, "defaultErrnoRet", "defaultErrno", profile_name)) is not None:
        profile["defaultErrnoRet"] = number
    if architectures := _architectures(document, architecture, profile_name):
        profile["architectures"] = architectures
    if document.get("flags"):
        profile["flags"] = document["flags"]
    for key in ("listenerPath", "listenerMetadata"):
        if document.get(key):
            profile[key] = document[key]
    profile["syscalls"] = [
        _rule(rule, names, f"{profile_name}: key syscalls.{index}")
        for index, rule in enumerate(document.get("syscalls") or ())
        if (names := _names(rule, f"{profile_name}: key syscalls.{index}"))
        and _applies(rule, capabilities, architecture, _version(kernel))
    ]
    _check_listener(profile, profile_name)
    return profile


def _check_listener(profile: Seccomp, profile_name: str) -> None:
    """Refuse what no OCI runtime can start: calls that a program answers (SCMP_ACT_NOTIFY), without its socket."""
    if profile["defaultAction"] == _NOTIFY:
        raise InvalidArgumentError(
            f"{profile_name}: key defaultAction: {_NOTIFY} is for rules only, as the runtime makes calls of its own"
        )
    if not profile.get("listenerPath"):
        if any(rule["action"] == _NOTIFY for rule in profile["syscalls"]):
            raise InvalidArgumentError(
                f"{profile_name}: key listenerPath: a rule has {_NOTIFY}; give the socket of the program that answers"
            )
        if profile.get("listenerMetadata"):
            raise InvalidArgumentError(f"{profile_name}: key listenerMetadata: it needs a listenerPath")


def _by_argument(one: Filter) -> list[Seccomp]:
    """One rule for each match: OCI runtimes may treat several conditions on one argument as alternatives, or not."""
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


def _document(text: bytes, profile_name: str) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidArgumentError(f"{profile_name} is not valid JSON: {e}") from e
    for error in _validator().iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise InvalidArgumentError(f"{profile_name}: key {key}: {error.message[:300]}")
    return dict(document)


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/seccomp.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _architectures(document: Mapping[str, Any], architecture: str, profile_name: str) -> list[str]:
    listed, mapped = document.get("architectures") or [], document.get("archMap") or []
    if listed and mapped:
        raise InvalidArgumentError(f"{profile_name}: keys architectures and archMap are both set; give one")
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
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    return not excludes.get("minKernel") or kernel < _version(excludes["minKernel"])


def _version(release: str) -> tuple[int, int]:
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})(?![0-9])", release)
    if not match:
        raise InvalidArgumentError(f"kernel release {quoted(release)} does not begin with a version")
    return int(match[1]), int(match[2])


def _names(rule: Mapping[str, Any], rule_name: str) -> list[str]:
    """The system calls of a rule. A list may be empty, and programs that write profiles write unset keys as "" or null.

    Raises InvalidArgumentError.
    """
    names, name = rule.get("names"), rule.get("name")
    if (names and name) or not {"name", "names"} & rule.keys():
        raise InvalidArgumentError(f"{rule_name}: it must have either names or, as in old profiles, name")
    return list(names or ([name] if name else ()))


def _rule(rule: Mapping[str, Any], names: list[str], rule_name: str) -> Seccomp:
    oci_rule: Seccomp = {"names": names, "action": rule["action"]}
    if (number := _errno(rule, "errnoRet", "errno", rule_name)) is not None:
        oci_rule["errnoRet"] = number
    if rule.get("args"):
        oci_rule["args"] = [{"value": 0, **argument} for argument in rule["args"]]
    return oci_rule


def _errno(table: Mapping[str, Any], number: str, name: str, subject: str) -> int | None:
    """The error to return: its number, or its name ("EPERM"). Podman's profiles have both, or the name alone."""
    if table.get(number) is not None:
        return int(table[number])
    if name not in table:
        return None
    value = getattr(errno, table[name], None)
    if not isinstance(value, int):
        raise InvalidArgumentError(f"{subject}: key {name}: {table[name]!r} is not the name of an error")
    return value
