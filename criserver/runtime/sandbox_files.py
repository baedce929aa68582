"""The files that all containers of a pod see: resolv.conf, hosts, hostname, and /dev/shm."""

from __future__ import annotations

import os

from criserver.model import Dns, NamespaceMode, PodConfig
from criserver.runtime import selinux
from snapshotter import mounts

SHM_SIZE = 64 << 20


def resolv_conf(dns: Dns) -> str:
    """The text of resolv.conf (resolv.conf(5)); the host's own where the pod says nothing."""
    if not (dns.servers or dns.searches or dns.options):
        try:
            with open("/etc/resolv.conf") as f:
                return f.read()
        except OSError:
            return ""
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(f"{line}\n" for line in lines)


def hostname(config: PodConfig) -> str:
    """The pod's hostname; the node's where it names none."""
    return config.hostname or os.uname().nodename


def hosts(name: str, ips: tuple[str, ...]) -> str:
    """The text of /etc/hosts (hosts(5)) for a pod of its own network."""
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


def write(directory: str, config: PodConfig, label: str) -> None:
    """Make the directory with everything but what needs the pod's addresses; ``label`` is SELinux's, "" for none."""
    os.makedirs(directory, mode=0o711, exist_ok=True)
    _put(directory, "resolv.conf", resolv_conf(config.dns), label)
    _put(directory, "hostname", hostname(config) + "\n", label)
    if config.namespaces.network is NamespaceMode.NODE:
        write_hosts(directory, config, (), label)
    if config.namespaces.ipc is not NamespaceMode.NODE:
        shm = os.path.join(directory, "shm")
        os.makedirs(shm, exist_ok=True)
        options = f"mode=1777,size={SHM_SIZE}"
        if (user := config.namespaces.user) is not None:
            options += f",uid={user.uids.host_id},gid={user.gids.host_id}"
        if label:
            options += f',context="{label}"'
        mounts.mount("shm", shm, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, options)


def write_hosts(directory: str, config: PodConfig, ips: tuple[str, ...], label: str) -> None:
    """Write the hosts file, once the addresses are known; a pod on the node's network sees the node's."""
    if config.namespaces.network is NamespaceMode.NODE:
        try:
            with open("/etc/hosts") as f:
                text = f.read()
        except OSError:
            text = hosts(hostname(config), ())
    else:
        text = hosts(hostname(config), ips)
    _put(directory, "hosts", text, label)


def shm(directory: str, config: PodConfig) -> str:
    """The path that becomes /dev/shm of the pod's containers."""
    return "/dev/shm" if config.namespaces.ipc is NamespaceMode.NODE else os.path.join(directory, "shm")  # noqa: S108 - the host's own


def remove(directory: str) -> None:
    """Undo :func:`write`; what is gone already is no error."""
    mounts.unmount(os.path.join(directory, "shm"))
    for name in ("resolv.conf", "hostname", "hosts"):
        try:
            os.unlink(os.path.join(directory, name))
        except FileNotFoundError:
            continue
    for path in (os.path.join(directory, "shm"), directory):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue


def _put(directory: str, name: str, text: str, label: str) -> None:
    with open(os.path.join(directory, name), "w") as f:
        os.fchmod(f.fileno(), 0o644)
        selinux.set_label(f.fileno(), label)
        f.write(text)
