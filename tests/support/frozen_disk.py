"""A disk of a node's own, which can be made to stand still."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.node import Node


def give_disk(node: Node) -> None:
    """Have the root directory of a node on a disk. Its daemon does not run yet."""
    image = f"{node.base}/disk"
    with open(image, "wb") as f:
        f.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, node.root], check=True)
    os.chmod(node.root, 0o711)


@contextmanager
def frozen(path: str) -> Iterator[None]:
    """What writes to the disk below ``path`` waits."""
    subprocess.run(["fsfreeze", "--freeze", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", path], check=True)
