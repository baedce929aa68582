"""Which plugin owns which field of which container: two plugins may not set the same one."""

from __future__ import annotations

from collections.abc import Sequence

from criserver.errors import FailedPreconditionError
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.text import quoted

# This mark stands before the name of what a plugin removes, and before the name of a plugin that has removed a field.
REMOVAL = "-"
Field = nri.Field

_COMPOUND = frozenset(
    {
        Field.Annotations,
        Field.Mounts,
        Field.Devices,
        Field.CdiDevices,
        Field.Env,
        Field.HugepageLimits,
        Field.CgroupsUnified,
        Field.Rlimits,
        Field.Namespace,
        Field.Sysctl,
        Field.LinuxNetDevices,
    }
)


def removed(name: str) -> str | None:
    """The name that ``name`` marks for removal; None where it does not mark one."""
    return name[len(REMOVAL) :] if name.startswith(REMOVAL) else None


class Ownership:
    """The owners of fields. A compound field, such as the environment, has an owner for each key.

    ``message`` is what validators get. An owner of "-NAME" is the plugin NAME that has removed the value: only this
    plugin may set it again.
    """

    def __init__(self) -> None:
        self.message = nri.OwningPlugins()

    def owner(self, container_id: str, field: nri.Field, key: str = "") -> str:
        """The plugin that has set the field; "" for none. Plugins with hooks are separated by commas."""
        if container_id not in self.message.owners:
            return ""
        owners = self.message.owners[container_id]
        if field not in _COMPOUND:
            return owners.simple.get(field, "")
        return owners.compound[field].owners.get(key, "") if field in owners.compound else ""

    def claim(self, plugin: str, container_id: str, field: nri.Field, key: str = "") -> None:
        """Make ``plugin`` the owner. Raises FailedPreconditionError where the field has one."""
        self.claim_all(plugin, container_id, [(field, key)])

    def claim_all(self, plugin: str, container_id: str, wanted: Sequence[tuple[nri.Field, str]]) -> None:
        """Make ``plugin`` the owner of all these fields and keys, or of none of them. Raises as :meth:`claim`."""
        seen: set[tuple[nri.Field, str]] = set()
        for field, key in wanted:
            owner = plugin if (field, key) in seen else self.owner(container_id, field, key)
            seen.add((field, key))
            if owner and removed(owner) != plugin:
                raise FailedPreconditionError(_conflict(plugin, container_id, owner, field, key))
        for field, key in wanted:
            self._write(plugin, container_id, field, key)

    def clear(self, plugin: str, container_id: str, field: nri.Field, key: str = "") -> None:
        """Note that ``plugin`` has removed the value that another plugin has set. Nothing where none has."""
        if self.owner(container_id, field, key):
            self._write(REMOVAL + plugin, container_id, field, key)

    def join(self, plugin: str, container_id: str, field: nri.Field) -> None:
        """Make ``plugin`` one more owner of a simple field that can have several: the hooks."""
        owner = self.owner(container_id, field)
        self._write(f"{owner},{plugin}" if owner else plugin, container_id, field, "")

    def _write(self, owner: str, container_id: str, field: nri.Field, key: str) -> None:
        owners = self.message.owners[container_id]
        if field in _COMPOUND:
            owners.compound[field].owners[key] = owner
        else:
            owners.simple[field] = owner


def _conflict(plugin: str, container_id: str, owner: str, field: nri.Field, key: str) -> str:
    what = f"{Field.Name(field)} {quoted(key)}" if field in _COMPOUND else Field.Name(field)
    other = removed(owner) or owner
    if other == plugin:
        return f"NRI plugin {plugin} sets {what} of container {container_id} twice"
    did = "set" if other == owner else "removed"
    return f"NRI plugin {plugin} sets {what} of container {container_id}, which plugin {other} has {did}"
