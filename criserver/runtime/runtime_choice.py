"""Which runtime a handler has: an OCI runtime's command line, or a shim of containerd's kind."""

from __future__ import annotations

import os

from criserver.config import RuntimeHandler
from criserver.runtime.handler_runtime import HandlerRuntime
from criserver.runtime.oci_runtime import OciRuntime


def runtime_of(handler: RuntimeHandler, state: str) -> HandlerRuntime:
    """The runtime of a configured handler; ``state`` is the daemon's state directory."""
    if handler.shim:
        # Imported here: most nodes have no shims of containerd's kind, and save its memory.
        from criserver.runtime.shim_v2 import ShimV2

        return ShimV2.of(handler, state)
    return OciRuntime.of(handler, runtime_roots(state))


def runtime_roots(state: str) -> str:
    """The directory that has the root directory of each handler's OCI runtime."""
    return os.path.join(state, "runtimes")
