"""The features of a runtime handler on this node. The runtime and the kernel report them; no version is compared."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field, replace

import structlog

from criserver.errors import FailedPreconditionError
from criserver.oci.adjustment_faults import RuntimeFacts, runtime_facts
from criserver.runtime.handler_runtime import HandlerRuntime
from snapshotter import Snapshotter

log = structlog.get_logger(__name__)

_SYS_MOUNT_SETATTR = 442  # the same on every architecture


@dataclass(frozen=True, slots=True)
class Features:
    """The optional features of a handler (CRI RuntimeHandlerFeatures), and what plugins may ask of it (``facts``)."""

    recursive_readonly_mounts: bool = False
    idmapped_mounts: bool = False
    user_namespaces: bool = False
    facts: RuntimeFacts = field(default_factory=RuntimeFacts)


async def probe(runtime: HandlerRuntime, snapshotter: Snapshotter) -> Features:
    """The features of a handler on this node; none of them if its runtime does not report its features."""
    features = await ask(runtime)
    if features is None or not _kernel_has_mount_setattr():
        return Features() if features is None else Features(facts=features.facts)
    if features.user_namespaces and (error := await snapshotter.idmap_trouble()):
        log.warning("pods of a runtime handler cannot have user namespaces", handler=runtime.handler, error=error)
        return replace(features, user_namespaces=False)
    return features


async def ask(runtime: HandlerRuntime) -> Features | None:
    """The features that a runtime reports, whatever the kernel has; None if it is missing or does not report any."""
    try:
        report = await runtime.features()
    except FailedPreconditionError:
        log.warning("a runtime handler's program does not exist", handler=runtime.handler, path=runtime.path)
        return None
    if report is None:
        log.warning("a runtime does not report its features", handler=runtime.handler, path=runtime.path)
        return None
    linux = report.get("linux", {})
    idmap = linux.get("mountExtensions", {}).get("idmap", {}).get("enabled") is True
    return Features(
        recursive_readonly_mounts="rro" in report.get("mountOptions", ()),
        idmapped_mounts=idmap,
        user_namespaces=idmap and "user" in linux.get("namespaces", ()),
        facts=runtime_facts(report),
    )


def _kernel_has_mount_setattr() -> bool:
    """Whether the kernel has mount_setattr(2) (Linux 5.12), which all of these features need."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_MOUNT_SETATTR, -1, None, 0, None, 0)
    return ctypes.get_errno() != errno.ENOSYS
