"""The files that all containers of a pod share: resolv.conf, hosts, hostname, and /dev/shm.

Containers can write to the three files. These are on disk, so that a container that fills /etc/hostname takes no memory
from others. /dev/shm has a size limit, and data in it counts as memory of the container that writes it.
"""

from __future__ import annotations

import errno
import os

from criserver.errors import CriError, FailedPreconditionError, ResourceExhaustedError, exhaustion
from criserver.model import Dns, NamespaceMode, PodConfig
from criserver.runtime import selinux
from snapshotter import mounts, removal
from snapshotter.files import make_private

_FILES = ("resolv.conf", "hostname", "hosts")
_RESOLV_CONF, _HOSTS = "/etc/resolv.conf", "/etc/hosts"  # the node's


def resolv_conf(dns: Dns) -> str:
    """The text of resolv.conf (resolv.conf(5)): the pod's DNS settings, or the node's file if the pod has none."""
    if not (dns.servers or dns.searches or dns.options):
        return _of_node(_RESOLV_CONF) or ""
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(f"{line}\n" for line in lines)


def hostname(config: PodConfig) -> str:
    """The pod's hostname; the node's if the pod has none."""
    return config.hostname or os.uname().nodename


def hosts(name: str, ips: tuple[str, ...]) -> str:
    """The text of /etc/hosts (hosts(5)) for a pod with its own network."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::0\tip6-localnet",
        "fe00::0\tip6-mcastprefix",
        "fe00::1\tip6-allnodes",
        "fe00::2\tip6-allrouters",
        *(f"{ip}\t{name}" for ip in ips),
    ]
    return "".join(f"{line}\n" for line in lines)


def write(files: str, directory: str, config: PodConfig, label: str, shm_size: int) -> None:
    """Make the directory ``files`` with its files, and ``directory`` with /dev/shm. Blocks.

    The hosts file of a pod with its own network comes later, as it needs the pod's addresses. ``label`` is a SELinux
    label, "" for none. ``shm_size`` is the size of /dev/shm in bytes. Raises ResourceExhaustedError on a full disk,
    FailedPreconditionError for a file of the node that cannot be read.
    """
    make_private(files)
    _put(files, "resolv.conf", resolv_conf(config.dns), label)
    _put(files, "hostname", hostname(config) + "\n", label)
    if config.namespaces.network is NamespaceMode.NODE:
        write_hosts(files, config, (), label)
    make_private(directory)
    if config.namespaces.ipc is not NamespaceMode.NODE:
        shm = os.path.join(directory, "shm")
        make_private(shm)
        options = f"mode=1777,size={shm_size}"
        if (user := config.namespaces.user) is not None:
            options += f",uid={user.uids.host_id},gid={user.gids.host_id}"
        if label:
            options += f',context="{label}"'
        mounts.mount("shm", shm, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, options)


def write_hosts(files: str, config: PodConfig, ips: tuple[str, ...], label: str) -> None:
    """Write the hosts file, with the pod's addresses; a pod on the node's network gets the node's file. Blocks."""
    if config.namespaces.network is NamespaceMode.NODE:
        text = _of_node(_HOSTS)
        if text is None:
            text = hosts(hostname(config), ())
    else:
        text = hosts(hostname(config), ips)
    _put(files, "hosts", text, label)


def adopt(files: str, directory: str, label: str) -> None:
    """Copy the files of a pod from ``directory``, where earlier releases kept them, to ``files``. Blocks.

    Containers that were made before still see the old files.
    """
    if os.path.isdir(files):
        return
    make_private(files)
    for name in _FILES:
        _put(files, name, _read(os.path.join(directory, name)), label)


def shm(directory: str, config: PodConfig) -> str:
    """The path on the node that is mounted as /dev/shm in the pod's containers."""
    return "/dev/shm" if config.namespaces.ipc is NamespaceMode.NODE else os.path.join(directory, "shm")  # noqa: S108 - the host's own


def remove(files: str, directory: str) -> None:
    """Undo :func:`write`, also if a part is gone already. Blocks. Raises CriError with the reason of a failure."""
    try:
        mounts.unmount(os.path.join(directory, "shm"))
        for path in (directory, files):
            removal.remove_path(path)
    except OSError as e:
        raise CriError(f"a pod's files cannot be removed: {e}") from e


def _of_node(path: str) -> str | None:
    """A file of the node for a pod; None if it does not exist. Raises FailedPreconditionError if it cannot be read."""
    try:
        return _read(path)
    except FileNotFoundError:
        return None
    except OSError as e:
        if exhaustion(e):  # a lack of descriptors is temporary, and has another status
            raise
        raise FailedPreconditionError(f"{path} of the node cannot be read for a pod: {e.strerror}") from e


def _read(path: str) -> str:
    """A file that :func:`_put` copies byte by byte: the node's files may have comments in any encoding."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
        return f.read()


def _put(directory: str, name: str, text: str, label: str) -> None:
    try:
        with open(os.path.join(directory, name), "w", encoding="utf-8", errors="surrogateescape", newline="") as f:
            os.fchmod(f.fileno(), 0o644)
            selinux.set_label(f.fileno(), label)
            f.write(text)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(f"{directory}/{name} cannot be written: {e.strerror}; make room there") from e
        raise
