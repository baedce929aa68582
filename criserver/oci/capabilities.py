"""The capabilities of a container's process (capabilities(7))."""

from __future__ import annotations

from collections.abc import Collection

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig
from criserver.oci.spec_inputs import HostFacts
from criserver.text import quoted

# In the order of their numbers, from 0 (capabilities(7), linux/capability.h).
CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
        "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
        "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
        "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
        "PERFMON BPF CHECKPOINT_RESTORE "
    ).split()
)
# The capabilities of an ordinary container: the set that Docker chose, and that images rely on.
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)


def capability_sets(config: ContainerConfig, host: HostFacts) -> dict[str, list[str]]:
    """The sets of the process: ALL is added or dropped first, single names after it.

    A capability that this kernel does not know, or that the daemon may not give, is left out. Raises
    InvalidArgumentError for a name that is no capability.
    """
    security = config.security
    if security.privileged:
        granted = set(host.capabilities)
    else:
        add, drop = _full_names(security.add_capabilities), _full_names(security.drop_capabilities)
        granted = set(DEFAULT_CAPABILITIES)
        if "ALL" in add:
            granted = set(host.capabilities)
        if "ALL" in drop:
            granted = set()
        granted = (granted | (add & set(host.capabilities))) - drop
    ambient = _full_names(security.ambient_capabilities)
    ambient = set(host.capabilities) if "ALL" in ambient else ambient & set(host.capabilities)
    granted |= ambient
    permitted = sorted(granted)
    return {
        "bounding": permitted,
        "effective": permitted,
        "permitted": permitted,
        "inheritable": sorted(ambient),
        "ambient": sorted(ambient),
    }


def lacking(config: ContainerConfig, host: HostFacts) -> list[str]:
    """The capabilities that a container requests by name and does not get, because this node does not have them."""
    security = config.security
    added = () if security.privileged else security.add_capabilities
    return sorted({_full_name(name) for name in (*added, *security.ambient_capabilities)} - {"ALL", *host.capabilities})


def _full_names(names: Collection[str]) -> set[str]:
    for name in names:
        if _full_name(name) not in ("ALL", *CAPABILITIES):
            raise InvalidArgumentError(f"{quoted(name)} is not a capability; capabilities(7) has their names")
    return {_full_name(name) for name in names}


def _full_name(name: str) -> str:
    upper = name.upper()
    return upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"
