"""The sysctls of a pod: which ones belong to its namespaces, and how they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from criserver.errors import InvalidArgumentError
from criserver.text import quoted

# Sysctls that belong to a namespace (kernel Documentation/admin-guide/sysctl). All others belong to the node.
_PREFIXES = {
    "net": ("net/",),
    "ipc": ("kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"),
    "uts": ("kernel/domainname",),
    "user": ("user/",),
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
    if not belongs(path, kinds):
        raise InvalidArgumentError(
            f"sysctl {quoted(name)} does not belong to a namespace that the pod has for itself "
            f"({', '.join(kinds) or 'it has none'}); it can only be set on the node"
        )
    return path


def belongs(path: str, kinds: Iterable[str]) -> bool:
    """Whether a sysctl, by its path, belongs to a namespace of ``kinds``."""
    return any(path.startswith(_PREFIXES[kind]) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A sysctl of a pod. ``path`` is below /proc/sys.

    An ``optional`` one is a default of this runtime: where the kernel refuses it, the pod runs without it.
    """

    path: str
    value: str
    optional: bool = False

    def write(self, *, final: bool) -> None:
        """Write it in the calling thread's namespaces. Raises as :meth:`refused` does."""
        try:
            write_once(f"/proc/sys/{self.path}", self.value)
        except OSError as e:
            self.refused(e.errno or 0, final=final)

    def refused(self, number: int, *, final: bool) -> None:
        """Note that the kernel refuses it with this error number. Raises InvalidArgumentError if that is an error.

        It is no error for an optional one, nor before the ``final`` attempt for a network sysctl that does not exist: a
        CNI plugin may make its interface.
        """
        early = not final and number == errno.ENOENT and self.path.startswith("net/")
        if not self.optional and not early:
            raise InvalidArgumentError(
                f"sysctl {self.path} = {quoted(self.value)} is refused by the kernel: {os.strerror(number)}"
            )


def requested(sysctls: Mapping[str, str], kinds: Iterable[str]) -> list[Sysctl]:
    """The sysctls that a pod requests by names. Raises as :func:`sysctl_path` does."""
    return [Sysctl(sysctl_path(name, list(kinds)), value) for name, value in sysctls.items()]


def write_once(path: str, text: str) -> None:
    """Write in one call, as files of /proc need it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
