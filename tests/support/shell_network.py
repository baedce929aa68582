"""A network of pods that is one CNI plugin, made of a shell script."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.node import Node

# What a plugin says that fails, as the end of a case.
REFUSES = """echo '{"code": 999, "msg": "the cluster does not answer"}'; exit 1;;"""


@contextmanager
def network_of(node: Node, script: str) -> Iterator[None]:
    """The network of new pods is one plugin of a shell script."""
    os.makedirs(f"{node.base}/bin", exist_ok=True)
    with open(f"{node.base}/bin/stuck", "w") as f:
        f.write(f"#!/bin/sh\ncat >/dev/null\ncase $CNI_COMMAND in\n{script}\nesac\n")
        os.fchmod(f.fileno(), 0o755)
    path = f"{node.cni}/05-stuck.conflist"
    with open(path, "w") as f:
        json.dump({"cniVersion": "1.0.0", "name": "stuck", "plugins": [{"type": "stuck"}]}, f)
    try:
        yield
    finally:
        os.unlink(path)
