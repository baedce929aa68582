"""What a runtime handler can do on this kernel: asked of the runtime and of the kernel, not guessed by version."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import shutil
from dataclasses import dataclass
from typing import Any

import structlog

from criserver.config import Runtime
from snapshotter import Snapshotter

log = structlog.get_logger(__name__)

_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Features:
    """What a handler offers beyond the ordinary (CRI RuntimeHandlerFeatures)."""

    recursive_readonly_mounts: bool = False
    idmapped_mounts: bool = False
    user_namespaces: bool = False


async def probe(runtime: Runtime, snapshotter: Snapshotter) -> Features:
    """The features of a handler; none where its runtime is missing or does not tell (runc before 1.1)."""
    told = await ask(runtime)
    if not _kernel_has_mount_setattr():
        return Features()
    linux = told.get("linux", {})
    idmap = linux.get("mountExtensions", {}).get("idmap", {}).get("enabled") is True
    return Features(
        recursive_readonly_mounts="rro" in told.get("mountOptions", ()),
        idmapped_mounts=idmap,
        user_namespaces=idmap and "user" in linux.get("namespaces", ()) and await snapshotter.idmap_supported(),
    )


async def ask(runtime: Runtime) -> dict[str, Any]:
    """What ``features`` of the runtime prints (runtime specification, features.md)."""
    program = shutil.which(runtime.path)
    if program is None:
        log.warning("a runtime handler's program is not there", handler=runtime.name, path=runtime.path)
        return {}
    process = await asyncio.create_subprocess_exec(
        program,
        "features",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            printed, _ = await process.communicate()
        told = json.loads(printed) if process.returncode == 0 else None
    except TimeoutError:
        process.kill()
        await process.wait()
        told = None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        log.warning("a runtime does not tell its features", handler=runtime.name, path=program)
        return {}
    return told


def _kernel_has_mount_setattr() -> bool:
    """Whether mount_setattr(2) is there, which all of these need (Linux 5.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_MOUNT_SETATTR, -1, None, 0, None, 0)
    return ctypes.get_errno() != errno.ENOSYS
