"""SELinux: the labels of a container's processes and files, a level for each pod, and volumes that are relabelled.

Where a policy with types for containers is loaded, a pod's containers have a pair of categories that no other pod has
(MCS), so that one pod cannot touch another's files whatever their users and modes are.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.model import Security, SelinuxOptions
from snapshotter import file_tree

_ATTRIBUTE = "security.selinux"
_USER, _ROLE, _FILE_ROLE, _LEVEL = "system_u", "system_r", "object_r", "s0"
_CATEGORIES = 1024
_PROCESS_TYPE, _FILE_TYPE = "container_t", "container_file_t"
_PRIVILEGED_TYPE = "spc_t"
# Network plugins and storage drivers ask for them in manifests that are the same on nodes without SELinux.
_UNCONFINED = frozenset({_PRIVILEGED_TYPE, "unconfined_t"})
# Of the node, not of a container: whoever relabels them takes them from the node's own services.
_NODES = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib64 /opt /proc /root /run /sbin /srv /sys /tmp /usr /var /var/lib /var/log "
    "/var/run /var/tmp".split()
)


class Labels(NamedTuple):
    """Of a container's processes, and of its files; "" for none of its own."""

    process: str = ""
    files: str = ""


@cache
def is_enabled() -> bool:
    """Whether a SELinux policy is loaded."""
    return os.path.exists("/sys/fs/selinux/enforce")


@cache
def labels_containers() -> bool:
    """Whether a policy is loaded that has types for containers, their files, and privileged ones."""
    level = f"{_LEVEL}:c0,c1"
    processes = (f"{_USER}:{_ROLE}:{kind}:{level}" for kind in (types()[0], _PRIVILEGED_TYPE))
    return is_enabled() and all(map(_is_known, (*processes, pod_files(level))))


def pod_level(asked: SelinuxOptions, others: Iterable[str]) -> str:
    """The level of a new pod: what it asks for, or one that is not among the ``others``'.

    "" where containers are not labelled by themselves: without SELinux, or with a policy that has no types for them.
    Raises InvalidArgumentError for a level that the policy does not know.
    """
    if not labels_containers():
        return ""
    if asked.level:
        _check_known(pod_files(asked.level), "pod sandbox")
        return asked.level
    taken = set(others)
    while True:
        first, second = sorted(secrets.SystemRandom().sample(range(_CATEGORIES), 2))
        level = f"{_LEVEL}:c{first},c{second}"
        if level not in taken:
            return level


def labels(security: Security, level: str) -> Labels:
    """The labels of a container in a pod of this level; what it asks for counts first."""
    asked = security.selinux
    if not is_enabled() or not (level or any(asked)):
        return Labels()
    kind = asked.type or (_PRIVILEGED_TYPE if security.privileged else types()[0])
    own_level = asked.level or level or _LEVEL
    user = asked.user or _USER
    # A privileged process is bounded by nothing, and what it makes is its pod's.
    process_level = (asked.level or _LEVEL) if security.privileged else own_level
    return Labels(
        f"{user}:{asked.role or _ROLE}:{kind}:{process_level}", f"{user}:{_FILE_ROLE}:{types()[1]}:{own_level}"
    )


def pod_files(level: str) -> str:
    """The label of what all containers of a pod see; "" for ""."""
    return f"{_USER}:{_FILE_ROLE}:{types()[1]}:{level}" if level else ""


def check(security: Security, level: str, what: str) -> None:
    """Refuse labels that nobody would keep.

    Raises FailedPreconditionError where there is no policy and a confinement is asked for, InvalidArgumentError for a
    label that the policy does not know.
    """
    asked = security.selinux
    if not any(asked):
        return
    if is_enabled():
        for label in labels(security, level):
            _check_known(label, what)
    elif not security.privileged and asked.type not in _UNCONFINED:
        given = ", ".join(f"{field} = {value}" for field, value in asked._asdict().items() if value)
        raise FailedPreconditionError(
            f"{what}: selinux_options ask for {given}, and this node has no SELinux policy; run the pod on a node that "
            "has one, or leave selinux_options out"
        )


def set_label(file: str | int, label: str) -> None:
    """Label a file by its path or descriptor, and not what a link leads to; "" changes nothing. Raises OSError."""
    if label:
        os.setxattr(file, _ATTRIBUTE, label.encode() + b"\0", follow_symlinks=isinstance(file, int))


def relabel(path: str, label: str) -> None:
    """Give a volume and all that is in it the label; blocks. Links are labelled, and not followed.

    A file system that has no labels is left as it is: the policy says what its files are. So is one that is mounted in
    the volume. Raises InvalidArgumentError
    for a directory of the node itself, FailedPreconditionError where a file cannot be labelled.
    """
    if path in _NODES:
        raise InvalidArgumentError(f"selinux_relabel: {path} is the node's own; it cannot be given a container's label")
    try:
        set_label(path, label)
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        return
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.ELOOP):
            return
        raise _refusal(path, e) from e
    try:
        # A label is no change of a directory's content, but one of its attributes.
        for place, entry in file_tree.walk(top, lambda status: status.st_mtime):
            try:
                set_label(f"/proc/self/fd/{place.fd}/{entry.name}", label)
            except FileNotFoundError:
                continue  # it has gone meanwhile
            except OSError as e:
                raise OSError(e.errno, e.strerror, file_tree.shortened(place.path_of(entry.name))) from e
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            return
        raise _refusal(path, e) from e
    finally:
        os.close(top)


def _refusal(path: str, error: OSError) -> FailedPreconditionError:
    where = path if error.filename in (None, path) else os.path.join(path, os.fsdecode(error.filename))
    return FailedPreconditionError(f"selinux_relabel: {where!r}: {error.strerror}")


@cache
def types(root: str = "/etc/selinux") -> tuple[str, str]:
    """The types that the loaded policy has for processes and files of containers (lxc_contexts(5))."""
    try:
        config = _values(f"{root}/config")
        contexts = _values(f"{root}/{config['SELINUXTYPE']}/contexts/lxc_contexts")
        process, file = (contexts[name].strip('"').split(":")[2] for name in ("process", "file"))
    except (OSError, KeyError, IndexError):
        return _PROCESS_TYPE, _FILE_TYPE
    return process, file


def _values(path: str) -> dict[str, str]:
    """NAME=VALUE lines."""
    with open(path) as f:
        lines = [line.partition("=") for line in f if "=" in line and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip() for name, _, value in lines}


def _check_known(label: str, what: str) -> None:
    if not _is_known(label):
        raise InvalidArgumentError(f"{what}: selinux_options: the node's policy does not know the label {label}")


def _is_known(label: str) -> bool:
    """Whether the policy has all parts of a label, and allows them together (/sys/fs/selinux/context)."""
    try:
        with open("/sys/fs/selinux/context", "r+b", buffering=0) as f:
            f.write(label.encode() + b"\0")
    except OSError:
        return False
    return True
