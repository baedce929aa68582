"""This boot of the node: what was made in an earlier one has no processes and no mounts any more."""

from __future__ import annotations

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def boot_id() -> str:
    """The kernel's ID of this boot (proc(5))."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
