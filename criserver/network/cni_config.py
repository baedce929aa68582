"""The CNI configuration directory: the network of the node's pods.

The first valid file in order of names counts, as in other runtimes. The directory is listed again on each use. So the
daemon needs no restart when a network plugin installs or changes its file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import structlog

from criserver.errors import FailedPreconditionError, disk_fault, exhaustion

# Ascending. Older versions have no plugin lists and no lists of addresses. The newest one is implemented here.
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
# A file of these, or without a version, is taken as one of 0.3.1: the keys are the same, and the plugins speak it.
_BEFORE_LISTS, _FIRST_WITH_LISTS = re.compile(r"0\.[12]\.0"), "0.3.1"

# The keys of this specification whose null means that they are not there, as for programs in Go. Other keys are the
# plugins' own.
_KEYS = frozenset(
    "cniVersion cniVersions name disableCheck disableGC loadOnlyInlinedPlugins plugins capabilities ipam dns".split()
)
_SUFFIXES = (".conflist", ".conf", ".json")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """A network: its plugins in the order of ADD, as in the file. ``source`` is the path of the file."""

    name: str
    cni_version: str
    plugins: tuple[Mapping[str, Any], ...]
    disable_check: bool
    source: str

    def has_version(self, version: str) -> bool:
        """Whether the network's version is ``version`` of the CNI specification, or newer."""
        return VERSIONS.index(self.cni_version) >= VERSIONS.index(version)


class CniConfigDirectory:
    """A directory of CNI configuration files."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._loaded_listing: list[tuple[str, int, int, int]] | None = None
        self._outcome: NetworkConfig | str = ""

    def current(self) -> NetworkConfig:
        """The network now. The files are read only when the listing has changed.

        Raises FailedPreconditionError where there is no file, and with the fault of each file where none is valid.
        """
        try:
            listing = _listing(self._path)
            if listing != self._loaded_listing:
                self._outcome = _load(self._path)
                self._loaded_listing = listing
        except OSError as e:
            raise FailedPreconditionError(f"cannot read the CNI configuration in {self._path}: {e}") from e
        if isinstance(self._outcome, str):
            raise FailedPreconditionError(self._outcome)
        return self._outcome


class _CniConfigError(Exception):
    """A file is not a valid configuration; the message has the reason."""


def _listing(directory: str) -> list[tuple[str, int, int, int]]:
    """Path, inode, size and time of every file: they differ when a file or its mode was changed."""
    stamps = []
    for entry in _scan(directory):
        if entry.is_dir():
            stamps += [_stamp(e) for e in _scan(entry.path) if e.name.endswith(".conf")]
        elif entry.name.endswith(_SUFFIXES):
            stamps.append(_stamp(entry))
    return sorted(stamps)


def _scan(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _stamp(entry: os.DirEntry[str]) -> tuple[str, int, int, int]:
    try:
        stat = entry.stat()
    except FileNotFoundError:
        return entry.path, 0, 0, 0
    return entry.path, stat.st_ino, stat.st_size, stat.st_ctime_ns  # a change of the mode counts too


def _load(directory: str) -> NetworkConfig | str:
    """The network of ``directory``, or the reason why there is none."""
    faults = []
    for path in sorted(e.path for e in _scan(directory) if e.name.endswith(_SUFFIXES) and not e.is_dir()):
        try:
            return _network(path)
        except _CniConfigError as e:
            _log.warning("CNI configuration file ignored", path=path, reason=str(e))
            faults.append(f"{path}: {e}")
    if faults:
        return f"no valid CNI configuration in {directory}: {'; '.join(faults)}"
    return (
        f"no CNI configuration in {directory}: install a network plugin, or put a .conflist file there; "
        "the daemon reads it without a restart"
    )


def _network(path: str) -> NetworkConfig:
    document = _read(path)
    if not path.endswith(".conflist"):
        if "plugins" in document:
            raise _CniConfigError("key plugins: a list of plugins must be in a file that ends in .conflist")
        document = {k: document[k] for k in ("name", "cniVersion") if k in document} | {"plugins": [document]}
        document["loadOnlyInlinedPlugins"] = True
    _check(document, "list")
    plugins = document.get("plugins", [])
    if not _true(document.get("loadOnlyInlinedPlugins", False)):
        plugins = [*plugins, *_sibling_plugins(path, document["name"])]
    if not plugins:
        raise _CniConfigError("key plugins: there is none, and no plugin file in the directory with the network's name")
    return NetworkConfig(
        name=document["name"],
        cni_version=_version(document),
        plugins=tuple(plugins),
        disable_check=_true(document.get("disableCheck", False)),
        source=path,
    )


def _sibling_plugins(path: str, name: str) -> list[Mapping[str, Any]]:
    """Plugins in files of their own, from the directory with the network's name (specification 1.1, section 1)."""
    plugins: list[Mapping[str, Any]] = []
    for file in sorted(e.path for e in _scan(os.path.join(os.path.dirname(path), name)) if e.name.endswith(".conf")):
        try:
            plugin = _read(file)
            _check(plugin, "plugin")
        except _CniConfigError as e:
            raise _CniConfigError(f"its plugin file {file}: {e}") from e
        plugins.append(plugin)
    return plugins


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            document = json.loads(f.read())
    except OSError as e:
        if exhaustion(e) or disk_fault(e):
            raise  # it may be over soon, and says nothing of the file: another one must not take its place
        raise _CniConfigError(f"cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise _CniConfigError(f"is not valid JSON: {e}") from e
    if not isinstance(document, dict):
        raise _CniConfigError("is not a JSON object")
    found = _without_nulls(document)
    if isinstance(plugins := found.get("plugins"), list):
        found["plugins"] = [_without_nulls(plugin) if isinstance(plugin, dict) else plugin for plugin in plugins]
    return found


def _without_nulls(table: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration or plugin without the keys of the specification that are null, also in its ``dns``."""
    found = {key: value for key, value in table.items() if value is not None or key not in _KEYS}
    if isinstance(dns := found.get("dns"), dict):
        found["dns"] = {key: value for key, value in dns.items() if value is not None}
    return found


def _check(document: dict[str, Any], kind: str) -> None:
    # Imported here: the daemon needs it once, and its import takes longer than the rest of this room.
    import jsonschema

    schema = json.loads(files("criserver.network").joinpath("schema/network.json").read_text())
    schema["$ref"] = f"#/$defs/{kind}"
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise _CniConfigError(f"key {key}: {error.message[:300]}")


def _version(document: Mapping[str, Any]) -> str:
    """The highest version of the file that is supported here (specification 1.1, "Version considerations")."""
    named = [document["cniVersion"]] if document.get("cniVersion") else []
    versions = [*named, *document.get("cniVersions", [])]
    supported = [v for v in VERSIONS if v in versions]
    if supported:
        return supported[-1]
    if not versions or any(_BEFORE_LISTS.fullmatch(version) for version in versions):
        return _FIRST_WITH_LISTS
    raise _CniConfigError(
        f"key cniVersion: {', '.join(versions)} is not supported; it must be one of {', '.join(VERSIONS)}"
    )


def _true(switch: bool | str) -> bool:
    return switch if isinstance(switch, bool) else switch.lower() == "true"
