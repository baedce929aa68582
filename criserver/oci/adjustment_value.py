"""An adjustment of an OCI spec as a value: what plugins of the node ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from criserver.text import quoted


@dataclass(frozen=True, slots=True)
class SpecAdjustment:
    """Changes of a spec, in the shapes of the OCI runtime specification. A value of None removes what has the key.

    ``hooks`` have the OCI name of their list. ``namespaces`` have the path to join by their type, or "" for a new one.
    ``resources`` is ``linux.resources`` without what stays as it is; ``unsupported`` are resources that an OCI spec has
    no place for, by the name of their NRI field. ``rdt_removed`` removes what the spec has before ``rdt`` is set.
    ``owners``: the plugin that asked, by the name of the NRI field and the key, or "".
    """

    container_id: str = ""
    annotations: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    hooks: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    cdi_devices: tuple[str, ...] = ()
    devices: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    cgroups_path: str = ""
    oom_score_adj: int | None = None
    io_priority: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    seccomp: Mapping[str, Any] | None = None
    namespaces: Mapping[str, str | None] = field(default_factory=dict)
    sysctls: Mapping[str, str | None] = field(default_factory=dict)
    net_devices: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    memory_policy: Mapping[str, Any] | None = None
    rdt: Mapping[str, Any] | None = None
    rdt_removed: bool = False
    mounts: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    rlimits: tuple[Mapping[str, Any], ...] = ()
    owners: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def asked_by(self, nri_field: str, key: str = "") -> str:
        """The beginning of an error: the plugin, the field and the container."""
        owner = self.owners.get((nri_field, key), "") or "an unknown plugin"
        what = f"{nri_field} {quoted(key)}" if key else nri_field
        return f"NRI plugin {owner} adjusts {what} of container {self.container_id}"
