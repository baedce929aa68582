"""The sysctls of a pod: which ones belong to its namespaces, and how they are written."""

from __future__ import annotations

import os

from criserver.errors import InvalidArgumentError
from criserver.text import quoted

# Sysctls that belong to a namespace (kernel Documentation/admin-guide/sysctl). All others belong to the node.
_PREFIXES = {
    "net": ("net/",),
    "ipc": ("kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"),
    "uts": ("kernel/domainname",),
}


def sysctl_path(name: str, kinds: list[str]) -> str:
    """The path below /proc/sys of a sysctl, spelled as sysctl(8) allows it.

    Raises InvalidArgumentError for a sysctl that does not belong to a namespace of ``kinds``.
    """
    dot, slash = name.find("."), name.find("/")
    swap = dot != -1 and (slash == -1 or dot < slash)
    path = name.translate(str.maketrans("./", "/.")) if swap else name
    if {"", ".", ".."} & set(path.split("/")) or "\0" in path:
        raise InvalidArgumentError(f"sysctl {quoted(name)} is not the name of a sysctl")
    if not any(path.startswith(_PREFIXES[kind]) for kind in kinds):
        raise InvalidArgumentError(
            f"sysctl {quoted(name)} does not belong to a namespace that the pod has for itself "
            f"({', '.join(kinds) or 'it has none'}); it can only be set on the node"
        )
    return path


def write_sysctl(path: str, value: str) -> None:
    """Write a sysctl of the calling thread's namespaces. Raises InvalidArgumentError."""
    try:
        write_once(f"/proc/sys/{path}", value)
    except OSError as e:
        raise sysctl_error(path, value, e.errno or 0) from e


def sysctl_error(path: str, value: str, number: int) -> InvalidArgumentError:
    """The exception for a sysctl that the kernel refuses with this error number."""
    return InvalidArgumentError(f"sysctl {path} = {quoted(value)} is refused by the kernel: {os.strerror(number)}")


def write_once(path: str, text: str) -> None:
    """Write in one call, as files of /proc need it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
