"""Which runtime a handler has: an OCI runtime's command line, or a shim of containerd's kind."""

from __future__ import annotations

import dataclasses
import json
import os

from criserver.config import RuntimeHandler
from criserver.errors import exhaustion
from criserver.runtime.handler_runtime import HandlerRuntime
from criserver.runtime.oci_runtime import OciRuntime


def runtime_of(handler: RuntimeHandler, state: str) -> HandlerRuntime:
    """The runtime of a configured handler; ``state`` is the daemon's state directory."""
    if handler.shim:
        # Imported here: most nodes have no shims of containerd's kind, and save its memory.
        from criserver.runtime.shim_v2 import ShimV2

        return ShimV2.of(handler, state, shim_roots(state))
    return OciRuntime.of(handler, runtime_roots(state))


def former_handler(name: str, bundle: str, default: RuntimeHandler) -> RuntimeHandler:
    """A handler that is not configured any more, for what it has started in the directory ``bundle``.

    1. Our shim has written down the program of a shim of containerd's kind (``shims/task_shim.py``).
    2. OCI runtimes understand each other's state: it is the default handler's program, or runc if that is a shim.

    Raises OSError where the node lacks descriptors or memory. A wrong runtime would find nothing to delete.
    """
    from criserver.runtime.shim_v2 import MARK

    try:
        with open(os.path.join(bundle, MARK)) as f:
            program = json.load(f)["program"]
    except (OSError, ValueError, LookupError) as e:
        if exhaustion(e):
            raise
        program = ""
    if program:
        return RuntimeHandler(name, shim=program)
    return RuntimeHandler(name, "runc") if default.shim else dataclasses.replace(default, name=name, root="")


def shim_roots(state: str) -> str:
    """The directory that has the root directory of each handler whose shim is runc's."""
    return os.path.join(state, "shims")


def runtime_roots(state: str) -> str:
    """The directory that has the root directory of each handler's OCI runtime."""
    return os.path.join(state, "runtimes")
