"""Whether the daemon may do its work: the user root, and its capabilities."""

from __future__ import annotations

from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config

# Numbers of capabilities(7) that mounts, namespaces, networks and the files of images need.
_NEEDED = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "MKNOD": 27,
    "SETFCAP": 31,
}
_SYS_RESOURCE = 24


def check(host: ExaminedNode, _: Config) -> Iterator[Finding]:
    """Root, and its capabilities."""
    if host.user() != 0:
        yield missing(
            "this check does not run as root: it only read files and tried nothing",
            "run it again as root",
        )
        return
    yield ok("running as root")
    effective = _mask(host.read("/proc/self/status") or "")
    lacking = [name for name, number in _NEEDED.items() if not effective >> number & 1]
    if lacking:
        yield missing(
            f"root lacks the capabilities {', '.join(lacking)}: this is a container or a restricted service",
            "give the service or container that this runs in these capabilities, or run on the node itself",
        )
    if not effective >> _SYS_RESOURCE & 1:
        yield warning(
            "no CAP_SYS_RESOURCE: containers' OOM scores cannot be lower than the daemon's own, and the kernel may "
            "kill a guaranteed pod before other pods",
            "give the service or container that this runs in CAP_SYS_RESOURCE",
        )


def _mask(status: str) -> int:
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return int(line.split()[1], 16)
