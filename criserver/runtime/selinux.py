"""SELinux: the labels of a container's processes and files, the level of each pod, and the relabelling of volumes.

If the loaded policy has types for containers, each pod has a pair of categories that no other pod has (MCS). So a pod
cannot access another pod's files, whatever their owners and modes are.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from criserver.errors import FailedPreconditionError, InvalidArgumentError, exhaustion
from criserver.model import Security, SelinuxOptions
from snapshotter import file_tree

_ATTRIBUTE = "security.selinux"
_USER, _ROLE, _FILE_ROLE, _LEVEL = "system_u", "system_r", "object_r", "s0"
_CATEGORIES = 1024
_PROCESS_TYPE, _FILE_TYPE = "container_t", "container_file_t"
_PRIVILEGED_TYPE = "spc_t"
# Network plugins and storage drivers request these types in manifests that are used on nodes without SELinux too.
_UNCONFINED = frozenset({_PRIVILEGED_TYPE, "unconfined_t"})
# Directories of the node that must not be relabelled: services of the node could not use their files any more.
_NODE_DIRECTORIES = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib64 /opt /proc /root /run /sbin /srv /sys /tmp /usr /var /var/lib /var/log "
    "/var/run /var/tmp".split()
)


class Labels(NamedTuple):
    """The labels of a container's processes and of its files; "" means that no label is set."""

    process: str = ""
    files: str = ""


@cache
def is_enabled() -> bool:
    """Whether a SELinux policy is loaded."""
    return os.path.exists("/sys/fs/selinux/enforce")


@cache
def labels_containers() -> bool:
    """Whether a policy is loaded that has the types for containers, privileged containers, and containers' files."""
    level = f"{_LEVEL}:c0,c1"
    processes = (f"{_USER}:{_ROLE}:{kind}:{level}" for kind in (types()[0], _PRIVILEGED_TYPE))
    return is_enabled() and all(map(_is_known, (*processes, pod_files(level))))


def pod_level(options: SelinuxOptions, others: Iterable[str]) -> str:
    """The level of a new pod: the requested one, or a random one that is not among ``others``, the other pods' levels.

    "" without SELinux, or if its policy has no types for containers: containers are not labelled by default then.
    Raises InvalidArgumentError for a level that the policy does not know.
    """
    if not labels_containers():
        return ""
    if options.level:
        _check_known(pod_files(options.level), "pod sandbox")
        return options.level
    taken = set(others)
    while True:
        first, second = sorted(secrets.SystemRandom().sample(range(_CATEGORIES), 2))
        level = f"{_LEVEL}:c{first},c{second}"
        if level not in taken:
            return level


def labels(security: Security, level: str) -> Labels:
    """The labels of a container in a pod of this level. The container's own SELinux options take precedence."""
    options = security.selinux
    if not is_enabled() or not (level or any(options)):
        return Labels()
    kind = options.type or (_PRIVILEGED_TYPE if security.privileged else types()[0])
    own_level = options.level or level or _LEVEL
    user = options.user or _USER
    # A privileged process has no categories unless it requests some. Its files have those of the pod.
    process_level = (options.level or _LEVEL) if security.privileged else own_level
    return Labels(
        f"{user}:{options.role or _ROLE}:{kind}:{process_level}", f"{user}:{_FILE_ROLE}:{types()[1]}:{own_level}"
    )


def pod_files(level: str) -> str:
    """The label of the files that all containers of a pod of this level share; "" if there is no level."""
    return f"{_USER}:{_FILE_ROLE}:{types()[1]}:{level}" if level else ""


def check(security: Security, level: str, what: str) -> None:
    """Check the labels that a container requests. Raises InvalidArgumentError for one that the policy does not know."""
    if is_enabled() and any(security.selinux):
        for label in labels(security, level):
            _check_known(label, what)


def ignored(security: Security) -> str:
    """The options that a container requests and that have no effect here, as this node has no policy; "" for none.

    Kubernetes documents them so (SELinuxOptions), and its conformance suite runs such containers on any node. Types
    that confine nothing are as good as none.
    """
    options = security.selinux
    if is_enabled() or security.privileged or options.type in _UNCONFINED:
        return ""
    return ", ".join(f"{field} = {value}" for field, value in options._asdict().items() if value)


def set_label(file: str | int, label: str) -> None:
    """Label a file, by its path or descriptor; no link is followed, and "" changes nothing. Raises OSError."""
    if label:
        os.setxattr(file, _ATTRIBUTE, label.encode() + b"\0", follow_symlinks=isinstance(file, int))


def relabel(path: str, label: str) -> None:
    """Label a volume and all files in it. Links are labelled themselves, and not followed. Blocks.

    Two kinds of file system are left as they are:

    1. One without support for labels. The policy has a label for its files.
    2. One that is mounted inside the volume.

    Raises InvalidArgumentError for a directory of the node itself, FailedPreconditionError if a file cannot be
    labelled.
    """
    if path in _NODE_DIRECTORIES:
        raise InvalidArgumentError(f"selinux_relabel: {path} is the node's own; it cannot be given a container's label")
    try:
        set_label(path, label)
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        return
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.ELOOP):
            return
        raise _labelling_error(path, e) from e
    try:
        # Labelling changes the ctime of a directory but not its mtime, so mtime shows whether its entries have changed.
        for place, entry in file_tree.walk(top, lambda status: status.st_mtime):
            try:
                set_label(f"/proc/self/fd/{place.fd}/{entry.name}", label)
            except FileNotFoundError:
                continue  # the file was deleted meanwhile
            except OSError as e:
                raise OSError(e.errno, e.strerror, file_tree.shortened(place.path_of(entry.name))) from e
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            return
        raise _labelling_error(path, e) from e
    finally:
        os.close(top)


def _labelling_error(path: str, error: OSError) -> FailedPreconditionError:
    where = path if error.filename in (None, path) else os.path.join(path, os.fsdecode(error.filename))
    return FailedPreconditionError(f"selinux_relabel: {where!r}: {error.strerror}")


@cache
def types(root: str = "/etc/selinux") -> tuple[str, str]:
    """The types of the loaded policy for containers' processes and for their files (lxc_contexts(5))."""
    try:
        config = _values(f"{root}/config")
        contexts = _values(f"{root}/{config['SELINUXTYPE']}/contexts/lxc_contexts")
        process, file = (contexts[name].strip('"').split(":")[2] for name in ("process", "file"))
    except (OSError, KeyError, IndexError) as e:
        if exhaustion(e):
            raise
        return _PROCESS_TYPE, _FILE_TYPE
    return process, file


def _values(path: str) -> dict[str, str]:
    """The settings in a file with lines of the form NAME=VALUE."""
    with open(path, errors="surrogateescape") as f:  # comments may be in any encoding
        lines = [line.partition("=") for line in f if "=" in line and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip() for name, _, value in lines}


def _check_known(label: str, what: str) -> None:
    if not _is_known(label):
        raise InvalidArgumentError(f"{what}: selinux_options: the node's policy does not know the label {label}")


def _is_known(label: str) -> bool:
    """Whether the policy knows all parts of a label and allows their combination (/sys/fs/selinux/context)."""
    try:
        with open("/sys/fs/selinux/context", "r+b", buffering=0) as f:
            f.write(label.encode() + b"\0")
    except OSError as e:
        if exhaustion(e):
            raise
        return False
    return True
