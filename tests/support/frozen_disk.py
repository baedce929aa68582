"""A disk of a node's own, which can be made to stand still."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.node import Node


def give_disk(node: Node, image: str = "", size: int = 256 << 20, *options: str) -> None:
    """Have the root directory of a node on a disk of so many bytes. Its daemon does not run yet.

    The disk's content is in the file ``image``, by default one of the node's. ``options`` are those of mkfs.ext4(8).
    """
    mount_disk(image or f"{node.base}/disk", node.root, size, *options)
    os.chmod(node.root, 0o711)


# Of mkfs.ext4(8): lists of directories do not have the types of files (readdir(3), d_type), as on XFS with ftype=0.
UNTYPED = ("-O", "^filetype")


def mount_disk(image: str | Path, point: str | Path, size: int, *options: str) -> None:
    """Make a disk of so many bytes in the file ``image``, and mount it at ``point``.

    ``options`` are those of mkfs.ext4(8).
    """
    with open(image, "wb") as f:
        f.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)


@contextmanager
def frozen(path: str) -> Iterator[None]:
    """What writes to the disk below ``path`` waits."""
    subprocess.run(["fsfreeze", "--freeze", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", path], check=True)
