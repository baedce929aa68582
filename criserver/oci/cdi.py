"""The Container Device Interface: files of device vendors with the changes that a container needs to use a device.

:func:`load` reads the directories, :func:`resolve` finds the edits for the devices that a container names, and
:func:`apply` makes them to its OCI spec. Container Device Interface specification 0.3.0 to 1.1.0 (SPEC.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from criserver.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, exhaustion
from criserver.oci.adjustment_faults import RuntimeFacts
from criserver.oci.cdi_edits import ContainerEdits, apply
from criserver.oci.cdi_files import QUALIFIED_NAME, CdiFile, read_file
from criserver.text import quoted

__all__ = ["CdiCatalog", "ContainerEdits", "apply", "from_annotations", "load", "parse_name", "resolve"]

# Ascending in priority.
DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
ANNOTATION_PREFIX = "cdi.k8s.io/"

_SUFFIXES = (".json", ".yaml")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CdiCatalog:
    """The files of ``directories``, and the files of each device by its qualified name.

    For a device only the files of the directory with the highest priority count. Several files for one device are a
    conflict: the device cannot be resolved.
    """

    directories: tuple[str, ...]
    files: tuple[CdiFile, ...]
    devices: Mapping[str, tuple[CdiFile, ...]]


def load(directories: Sequence[str] = DIRECTORIES, previous: CdiCatalog | None = None) -> CdiCatalog:
    """Read the CDI files of ``directories``. Later directories override earlier ones.

    Files that have not changed since ``previous`` are not read again. A file that cannot be used is logged, and is
    named in the error when a device is not found. The other files are used.
    """
    known = {f.path: f for f in previous.files} if previous else {}
    files: list[CdiFile] = []
    devices: dict[str, tuple[CdiFile, ...]] = {}
    for directory in directories:
        here = [read_file(path, known.get(path)) for path in _scan(directory)]
        files += here
        names: dict[str, tuple[CdiFile, ...]] = {}
        for file in here:
            for name in file.devices:
                names[name] = (*names.get(name, ()), file)
        devices |= names
    return CdiCatalog(tuple(directories), tuple(files), devices)


def parse_name(name: str) -> tuple[str, str]:
    """The kind ("vendor.com/class") and the device of a qualified name. Raises InvalidArgumentError."""
    match = QUALIFIED_NAME.fullmatch(name)
    if not match:
        raise InvalidArgumentError(f"CDI device {quoted(name)} is not of the form vendor.com/class=device")
    return match["kind"], match["device"]


def from_annotations(annotations: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that annotations name: kubelets without CRI's field use these. The names are not checked."""
    names: list[str] = []
    for key in sorted(annotations):
        if key.startswith(ANNOTATION_PREFIX):
            names += annotations[key].split(",")
    return tuple(names)


def resolve(names: Iterable[str], catalog: CdiCatalog, runtime: RuntimeFacts) -> ContainerEdits:
    """The edits for the devices ``names``, in their order. The common edits of a file come once, before its devices.

    Raises InvalidArgumentError for a malformed name. Raises NotFoundError for devices that are in no file, or in more
    than one; it lists the directories, and its cause is the error of a file that cannot be read now. Raises
    FailedPreconditionError for edits that the OCI ``runtime`` cannot make.
    """
    edits = ContainerEdits()
    seen: set[str] = set()
    faults = []
    names = list(dict.fromkeys(names))
    for name in names:
        parse_name(name)
        files = catalog.devices.get(name, ())
        if len(files) != 1:
            where = f"is in each of {', '.join(f.path for f in files)}" if files else "is in no file"
            faults.append(f"{name} {where}")
            continue
        file = files[0]
        if file.path not in seen:
            seen.add(file.path)
            edits += file.common
        edits += file.devices[name]
    if faults:
        unused = "".join(f"; {f.path} is not used: {f.fault}" for f in catalog.files if f.fault)
        raise NotFoundError(
            f"CDI devices cannot be resolved: {', '.join(faults)} (looked in {', '.join(catalog.directories)}{unused})"
        ) from next((f.lack for f in catalog.files if f.lack), None)
    if missing := edits.lacking(runtime):
        raise FailedPreconditionError(
            f"CDI devices {', '.join(names)} need an OCI runtime that reports {missing}, such as runc 1.4 or crun 1.27"
        )
    return edits


def _scan(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(e.path for e in entries if e.name.endswith(_SUFFIXES) and not e.is_dir())
    except FileNotFoundError:
        return []
    except OSError as e:
        if exhaustion(e):
            raise
        log.warning("CDI directory cannot be read", path=directory, reason=e.strerror)
        return []
