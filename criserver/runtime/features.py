"""The features of a runtime handler on this node. The runtime and the kernel report them; no version is compared."""

from __future__ import annotations

import asyncio
import ctypes
import errno
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import structlog

from criserver.errors import CriError, FailedPreconditionError, UnavailableError
from criserver.oci.adjustment_faults import RuntimeFacts, runtime_facts
from criserver.runtime.handler_runtime import HandlerRuntime
from snapshotter import SnapshotError, Snapshotter

log = structlog.get_logger(__name__)

_SYS_MOUNT_SETATTR = 442  # the same on every architecture


@dataclass(frozen=True, slots=True)
class Features:
    """The optional features of a handler (CRI RuntimeHandlerFeatures), and what plugins may ask of it (``facts``).

    ``unknown`` is why some are not known yet, and count as missing; "" if all are known.
    """

    recursive_readonly_mounts: bool = False
    idmapped_mounts: bool = False
    user_namespaces: bool = False
    facts: RuntimeFacts = field(default_factory=RuntimeFacts)
    unknown: str = ""

    def lacking(self, words: str) -> CriError:
        """The error of a call that needs a feature which is missing; ``words`` say which, and for whom."""
        if self.unknown:
            return UnavailableError(f"{words}; whether the runtime has that is not known yet: {self.unknown}")
        return FailedPreconditionError(words)


async def probe_all(runtimes: Iterable[HandlerRuntime], snapshotter: Snapshotter) -> dict[str, Features]:
    """The features of handlers on this node, by the handlers' names. All are asked at the same time."""
    wanted = list(runtimes)
    found = await asyncio.gather(*(_probe(runtime, snapshotter) for runtime in wanted))
    return {runtime.handler: features for runtime, features in zip(wanted, found, strict=True)}


async def _probe(runtime: HandlerRuntime, snapshotter: Snapshotter) -> Features:
    """The features of a handler on this node; none of them if its runtime does not report its features."""
    try:
        features = await ask(runtime)
    except UnavailableError as e:
        return _unknown(runtime, Features(), e)
    if features is None or not _kernel_has_mount_setattr():
        return Features() if features is None else Features(facts=features.facts)
    if features.user_namespaces:
        try:
            error = await snapshotter.idmap_trouble()
        except (SnapshotError, OSError) as e:
            return _unknown(runtime, replace(features, user_namespaces=False), e)
        if error:
            log.warning("pods of a runtime handler cannot have user namespaces", handler=runtime.handler, error=error)
            return replace(features, user_namespaces=False)
    return features


def _unknown(runtime: HandlerRuntime, features: Features, error: Exception) -> Features:
    log.warning("features of a runtime handler are not known yet", handler=runtime.handler, error=str(error))
    return replace(features, unknown=str(error))


async def ask(runtime: HandlerRuntime) -> Features | None:
    """The features that a runtime reports, whatever the kernel has; None if it is missing or does not report any.

    Raises UnavailableError if it may report them later.
    """
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
