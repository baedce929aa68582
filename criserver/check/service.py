"""What the daemon needs for itself: its addresses, its certificate, and a correct clock."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config
from criserver.errors import CriError
from criserver.own_directories import LOCK
from criserver.streaming import ServerCertificate

_OTHERS = {
    "containerd": "/run/containerd/containerd.sock",
    "CRI-O": "/var/run/crio/crio.sock",
    "cri-dockerd": "/var/run/cri-dockerd.sock",
}


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """The socket, the streaming server, other runtimes, the clock."""
    serving = _holder(host, config)
    if serving:
        yield ok(f"criserver serves at {config.grpc_address} (PID {serving})")
    else:
        yield _socket(host, config)
        yield from _streaming(config)
    for name, path in _OTHERS.items():
        if path == config.grpc_address or not host.exists(path):
            continue
        if path == config.containerd_address and serving and host.which("containerd") is None:
            yield warning(
                f"criserver answers the kubelet's cAdvisor at {path} too, which kubeadm takes for the socket of {name}",
                f"give kubeadm criSocket: unix://{config.grpc_address}",
            )
        else:
            yield warning(
                f"{name} is here too, at {path}: kubeadm does not ask, and uses it unless criSocket names criserver",
                f"give kubeadm criSocket: unix://{config.grpc_address}, or disable {name}",
            )
    if host.synchronised():
        yield ok("the clock is synchronised")
    else:
        yield warning(
            "the clock is not synchronised: certificates and tokens of registries and of the cluster depend on it",
            "run systemd-timesyncd, chrony or ntpd",
        )


def _holder(host: ExaminedNode, config: Config) -> int:
    """The PID of the daemon that uses the state directory, 0 if none does."""
    path = os.path.join(config.state, LOCK)
    held = host.read(path)
    if not held or not held.isdecimal():
        return 0
    inode = str(os.stat(host.path(path)).st_ino)
    # The file may have the PID of a daemon that has ended, so the kernel's list of locks decides (proc_locks(5)). To
    # take the lock as a test could make a daemon fail that starts at this moment. Other file systems have inodes of the
    # same number, so the PID is compared too.
    locks = (line.split() for line in (host.read("/proc/locks") or "").splitlines())
    return int(held) if any(f[1] == "FLOCK" and f[4] == held and f[5].endswith(":" + inode) for f in locks) else 0


def _socket(host: ExaminedNode, config: Config) -> Finding:
    path = host.path(config.grpc_address)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ok(f"nothing is at the socket's address {config.grpc_address}")
    if not stat.S_ISSOCK(found.st_mode):
        return missing(f"{config.grpc_address} is not a socket", "remove it, or give [grpc] another address")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(2)
            probe.connect(path)
        except OSError:
            return ok(f"the socket at {config.grpc_address} belongs to a daemon that has ended")
    return missing(
        f"another daemon answers at {config.grpc_address}", "stop it, or give [grpc] another address (and the kubelet)"
    )


def _streaming(config: Config) -> Iterator[Finding]:
    given = config.streaming
    where = f"streaming.address = {given.host}:{given.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            given.host, given.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        yield missing(
            f"{where}: {e.strerror}: the daemon does not start", "give [streaming] a free address of this node"
        )
        return
    if given.tls_cert:
        try:
            ServerCertificate(given.tls_cert, given.tls_key, given.tls_ca)
        except CriError as e:
            yield missing(str(e), "name a certificate and its key, and authorities of clients only where you have them")
            return
    elif not given.host.startswith("127.") and given.host not in ("::1", "localhost"):
        yield warning(
            f"{where}: others on the network can read the data of kubectl exec",
            "use 127.0.0.1, which is enough for the kubelet, or name a certificate",
        )
        return
    yield ok(where)
