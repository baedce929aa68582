"""SELinux: the label of a container's files, and volumes that are to be given it."""

from __future__ import annotations

import os
from functools import cache

from criserver.errors import FailedPreconditionError, InvalidArgumentError

_ATTRIBUTE = "security.selinux"
_FILE_TYPE = "container_file_t"
# Network plugins and storage drivers ask for them in manifests that are the same on nodes without SELinux.
_UNCONFINED = frozenset({"spc_t", "unconfined_t"})
# Of the node, not of a container: whoever relabels them takes them from the node's own services.
_NODES = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib64 /opt /proc /root /run /sbin /srv /sys /tmp /usr /var /var/lib /var/log "
    "/var/run /var/tmp".split()
)


@cache
def is_enabled() -> bool:
    """Whether a SELinux policy is loaded."""
    return os.path.exists("/sys/fs/selinux/enforce")


def can_confine(label: str) -> bool:
    """Whether this node keeps what ``label`` promises; where there is no policy, only what promises no confinement."""
    return is_enabled() or not label or label.split(":", 3)[2] in _UNCONFINED


def process_label(asked: str) -> str:
    """The label that a container's processes get which asks for ``asked``; "" on a node without SELinux."""
    return asked if is_enabled() else ""


def file_label(process: str, kind: str = "") -> str:
    """The label of the files of a container whose process has the label ``process``; "" for "".

    The user and the level are the process's; ``kind`` is the policy's type, :func:`file_type` where it is not given.
    """
    if not process:
        return ""
    user, _, _, level = process.split(":", 3)
    return f"{user}:object_r:{kind or file_type()}:{level}"


@cache
def file_type(root: str = "/etc/selinux") -> str:
    """The type that the loaded policy has for files of containers (lxc_contexts(5))."""
    try:
        config = _values(f"{root}/config")
        contexts = _values(f"{root}/{config['SELINUXTYPE']}/contexts/lxc_contexts")
        return contexts["file"].strip('"').split(":")[2]
    except (OSError, KeyError, IndexError):
        return _FILE_TYPE


def _values(path: str) -> dict[str, str]:
    """NAME=VALUE lines."""
    with open(path) as f:
        lines = [line.partition("=") for line in f if "=" in line and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip() for name, _, value in lines}


def relabel(path: str, label: str) -> None:
    """Give a volume and all that is in it the label; blocks. Links are labelled, and not followed.

    Raises InvalidArgumentError for a directory of the node itself, FailedPreconditionError where the file system
    cannot keep labels.
    """
    if path in _NODES:
        raise InvalidArgumentError(f"selinux_relabel: {path} is the node's own; it cannot be given a container's label")
    value = label.encode() + b"\0"
    try:
        _set(path, value)
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                _set(os.path.join(directory, name), value)
    except OSError as e:
        raise FailedPreconditionError(f"selinux_relabel: {e.filename or path}: {e.strerror}") from e


def _set(path: str, value: bytes) -> None:
    try:
        os.setxattr(path, _ATTRIBUTE, value, follow_symlinks=False)
    except FileNotFoundError:
        return  # it has gone meanwhile
