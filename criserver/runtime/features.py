"""What a runtime handler can do on this kernel: asked of the runtime and of the kernel, not guessed by version."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, replace

import structlog

from criserver.errors import FailedPreconditionError
from criserver.runtime.oci_runtime import OciRuntime
from snapshotter import Snapshotter

log = structlog.get_logger(__name__)

_SYS_MOUNT_SETATTR = 442  # the same on every architecture


@dataclass(frozen=True, slots=True)
class Features:
    """What a handler offers beyond the ordinary (CRI RuntimeHandlerFeatures)."""

    recursive_readonly_mounts: bool = False
    idmapped_mounts: bool = False
    user_namespaces: bool = False


async def probe(runtime: OciRuntime, snapshotter: Snapshotter) -> Features:
    """What a handler offers on this node; nothing where its runtime does not tell."""
    found = await ask(runtime)
    if found is None or not _kernel_has_mount_setattr():
        return Features()
    if found.user_namespaces and (trouble := await snapshotter.idmap_trouble()):
        log.warning("pods of a runtime handler cannot have user namespaces", handler=runtime.handler, error=trouble)
        return replace(found, user_namespaces=False)
    return found


async def ask(runtime: OciRuntime) -> Features | None:
    """What a runtime says of itself, whatever the node is; None where it is missing or does not tell."""
    try:
        told = await runtime.features()
    except FailedPreconditionError:
        log.warning("a runtime handler's program is not there", handler=runtime.handler, path=runtime.path)
        return None
    if told is None:
        log.warning("a runtime does not tell its features", handler=runtime.handler, path=runtime.path)
        return None
    linux = told.get("linux", {})
    idmap = linux.get("mountExtensions", {}).get("idmap", {}).get("enabled") is True
    return Features(
        recursive_readonly_mounts="rro" in told.get("mountOptions", ()),
        idmapped_mounts=idmap,
        user_namespaces=idmap and "user" in linux.get("namespaces", ()),
    )


def _kernel_has_mount_setattr() -> bool:
    """Whether mount_setattr(2) is there, which all of these need (Linux 5.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_MOUNT_SETATTR, -1, None, 0, None, 0)
    return ctypes.get_errno() != errno.ENOSYS
