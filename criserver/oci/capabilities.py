"""The capabilities of a container's process (capabilities(7))."""

from __future__ import annotations

from collections.abc import Iterable

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig
from criserver.oci.spec_inputs import HostFacts
from criserver.text import quoted

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

    Raises InvalidArgumentError for a capability that the kernel does not know, or that the daemon may not give.
    """
    security = config.security
    if security.privileged:
        granted = set(host.capabilities)
    else:
        add, drop = _full_names(security.add_capabilities, host), _full_names(security.drop_capabilities, host)
        granted = set(DEFAULT_CAPABILITIES)
        if "ALL" in add:
            granted = set(host.capabilities)
        if "ALL" in drop:
            granted = set()
        granted = (granted | (add - {"ALL"})) - drop
    ambient = _full_names(security.ambient_capabilities, host)
    if "ALL" in ambient:
        ambient = set(host.capabilities)
    granted |= ambient
    permitted = sorted(granted)
    return {
        "bounding": permitted,
        "effective": permitted,
        "permitted": permitted,
        "inheritable": sorted(ambient),
        "ambient": sorted(ambient),
    }


def _full_names(names: Iterable[str], host: HostFacts) -> set[str]:
    full_names = set()
    for name in names:
        upper = name.upper()
        full = upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"
        if full != "ALL" and full not in host.capabilities:
            raise InvalidArgumentError(
                f"capability {quoted(name)} is unknown to this kernel, or the daemon does not have it"
            )
        full_names.add(full)
    return full_names
