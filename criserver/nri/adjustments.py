"""The adjustments that plugins make to a container before it is created, merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, MutableMapping, MutableSequence
from typing import TypeVar

from criserver.errors import InvalidArgumentError
from criserver.nri.ownership import REMOVAL, Field, Ownership, removed
from criserver.nri.resource_updates import ResourceUpdates, claim_resources, merge_resources
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

Item = TypeVar("Item")

# Fields that one plugin sets as a whole.
_WHOLE = {
    "oom_score_adj": Field.OomScoreAdj,
    "io_priority": Field.IoPriority,
    "seccomp_policy": Field.SeccompPolicy,
    "scheduler": Field.LinuxSched,
    "memory_policy": Field.MemoryPolicy,
}
_RDT = {"clos_id": Field.RdtClosID, "schemata": Field.RdtSchemata, "enable_monitoring": Field.RdtEnableMonitoring}
_HOOKS = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


class ContainerAdjustments:
    """What plugins answer to one CreateContainer.

    Call :meth:`add` with the response of each plugin, in the order of the plugins. ``adjustment`` is the merged one: it
    has each key once, and "-KEY" for what is removed. ``updates`` has the updates of other containers, and the
    evictions.
    """

    def __init__(self, request: nri.CreateContainerRequest) -> None:
        self._original = self._request = request
        self._id = request.container.id
        self.ownership = Ownership()
        self.adjustment = nri.ContainerAdjustment()
        self.updates = ResourceUpdates(created=self._id, ownership=self.ownership)

    @property
    def request(self) -> nri.CreateContainerRequest:
        """The request with the container as adjusted so far: what the next plugin gets. It is not to be changed."""
        return self._request

    @property
    def owners(self) -> nri.OwningPlugins:
        """Who has set what."""
        return self.ownership.message

    def validation(self, plugins: Iterable[nri.PluginInstance]) -> nri.ValidateContainerAdjustmentRequest:
        """The request for validators: the container as it was at first, and all that ``plugins`` have asked for."""
        return nri.ValidateContainerAdjustmentRequest(
            pod=self._original.pod,
            container=self._original.container,
            adjust=self.adjustment,
            update=self.updates.updates,
            owners=self.owners,
            plugins=plugins,
        )

    def add(self, plugin: str, response: nri.CreateContainerResponse) -> None:
        """Take the response of ``plugin``.

        Raises FailedPreconditionError for a value that another plugin has set, with both names, the field and the
        container. Raises InvalidArgumentError for a response that can never be right. The creation has to fail then: a
        part of the response may have been taken.
        """
        if response.HasField("adjust"):
            self._add_adjustment(plugin, response.adjust)
        self.updates.add(plugin, response)

    def _add_adjustment(self, plugin: str, asked: nri.ContainerAdjustment) -> None:
        if self._request is self._original:  # a copy is made only for a plugin that adjusts something
            self._request = nri.CreateContainerRequest()
            self._request.CopyFrom(self._original)
        merged, shown = self.adjustment, self._request.container
        self._add_texts(plugin, Field.Annotations, asked.annotations, merged.annotations, shown.annotations)
        self._add_mounts(plugin, asked.mounts)
        self._add_env(plugin, asked.env)
        self._add_args(plugin, asked.args)
        self._add_hooks(plugin, asked.hooks)
        for limit in asked.rlimits:
            self._claim(plugin, Field.Rlimits, limit.type)
        merged.rlimits.extend(asked.rlimits)
        claimed = {limit.type for limit in asked.rlimits}
        _replace(shown.rlimits, [*(one for one in shown.rlimits if one.type not in claimed), *asked.rlimits])
        for device in asked.CDI_devices:
            self._claim(plugin, Field.CdiDevices, device.name)
            merged.CDI_devices.append(device)
            shown.CDI_devices.append(device)
        if asked.HasField("linux"):
            self._add_linux(plugin, asked.linux)

    def _add_linux(self, plugin: str, asked: nri.LinuxContainerAdjustment) -> None:
        merged, shown = self.adjustment.linux, self._request.container.linux
        self._add_devices(plugin, asked.devices)
        claim_resources(lambda field, key: self._claim(plugin, field, key), asked.resources)
        for resources in (merged.resources, shown.resources):
            merge_resources(resources, asked.resources)
        if asked.cgroups_path:
            self._claim(plugin, Field.CgroupsPath)
            merged.cgroups_path = shown.cgroups_path = asked.cgroups_path
        for name, field in _WHOLE.items():
            if asked.HasField(name):
                self._claim(plugin, field)
                getattr(merged, name).CopyFrom(getattr(asked, name))
                if name in nri.LinuxContainer.DESCRIPTOR.fields_by_name:
                    getattr(shown, name).CopyFrom(getattr(asked, name))
        self._add_namespaces(plugin, asked.namespaces)
        self._add_texts(plugin, Field.Sysctl, asked.sysctl, merged.sysctl, shown.sysctl)
        self._add_net_devices(plugin, asked)
        if asked.HasField("rdt"):
            self._add_rdt(plugin, asked.rdt)

    def _claim(self, plugin: str, field: nri.Field, key: str = "") -> None:
        self.ownership.claim(plugin, self._id, field, key)

    def _take_keys(self, plugin: str, field: nri.Field, names: Iterable[str]) -> tuple[set[str], set[str]]:
        """Clear the keys that ``names`` mark for removal, then claim the others. Returns both."""
        gone, claimed = set(), []
        for name in names:
            key = removed(name)
            if not (name if key is None else key):
                raise InvalidArgumentError(
                    f"NRI plugin {plugin} adjusts {Field.Name(field)} of container {self._id} without a name"
                )
            if key is None:
                claimed.append(name)
            else:
                gone.add(key)
                self.ownership.clear(plugin, self._id, field, key)
        for name in claimed:
            self._claim(plugin, field, name)
        return gone, set(claimed)

    def _add_list(
        self,
        plugin: str,
        field: nri.Field,
        asked: Iterable[Item],
        merged: MutableSequence[Item],
        name_of: Callable[[Item], str],
        marked: Callable[[str], Item],
    ) -> set[str]:
        """Merge a list whose items have a name. Returns the names that are now other than they were."""
        items = list(asked)
        gone, claimed = self._take_keys(plugin, field, map(name_of, items))
        changed = gone | claimed
        _replace(merged, [item for item in merged if name_of(item).removeprefix(REMOVAL) not in changed])
        merged.extend(item for item in items if name_of(item) in claimed)
        merged.extend(marked(REMOVAL + key) for key in sorted(gone - claimed))
        return changed

    def _add_mounts(self, plugin: str, asked: Iterable[nri.Mount]) -> None:
        shown = self._request.container.mounts
        items = list(asked)

        def name_of(mount: nri.Mount) -> str:
            return _path_name(mount.destination)

        changed = self._add_list(
            plugin, Field.Mounts, items, self.adjustment.mounts, name_of, lambda name: nri.Mount(destination=name)
        )
        _replace(shown, [mount for mount in shown if name_of(mount) not in changed])
        shown.extend(mount for mount in items if removed(mount.destination) is None)

    def _add_devices(self, plugin: str, asked: Iterable[nri.LinuxDevice]) -> None:
        shown = self._request.container.linux.devices
        items = list(asked)

        def name_of(device: nri.LinuxDevice) -> str:
            return _path_name(device.path)

        changed = self._add_list(
            plugin,
            Field.Devices,
            items,
            self.adjustment.linux.devices,
            name_of,
            lambda name: nri.LinuxDevice(path=name),
        )
        _replace(shown, [device for device in shown if name_of(device) not in changed])
        shown.extend(device for device in items if removed(device.path) is None)

    def _add_env(self, plugin: str, asked: Iterable[nri.KeyValue]) -> None:
        shown = self._request.container.env
        items = list(asked)
        for variable in items:
            if "=" in variable.key:
                raise InvalidArgumentError(
                    f"NRI plugin {plugin} adjusts Env {variable.key!r} of container {self._id}: a name has no '='"
                )
        changed = self._add_list(
            plugin, Field.Env, items, self.adjustment.env, lambda one: one.key, lambda name: nri.KeyValue(key=name)
        )
        _replace(shown, [line for line in shown if line.partition("=")[0] not in changed])
        shown.extend(f"{one.key}={one.value}" for one in items if removed(one.key) is None)

    def _add_texts(
        self,
        plugin: str,
        field: nri.Field,
        asked: MutableMapping[str, str],
        merged: MutableMapping[str, str],
        shown: MutableMapping[str, str],
    ) -> None:
        """Merge a map of texts: annotations, or sysctls."""
        gone, claimed = self._take_keys(plugin, field, sorted(asked))
        for key in gone | claimed:
            merged.pop(key, None)
            merged.pop(REMOVAL + key, None)
            shown.pop(key, None)
        for key in claimed:
            merged[key] = shown[key] = asked[key]
        for key in gone - claimed:
            merged[REMOVAL + key] = ""

    def _add_net_devices(self, plugin: str, asked: nri.LinuxContainerAdjustment) -> None:
        merged, shown = self.adjustment.linux.net_devices, self._request.container.linux.net_devices
        gone, claimed = self._take_keys(plugin, Field.LinuxNetDevices, sorted(asked.net_devices))
        for key in gone | claimed:
            merged.pop(key, None)
            merged.pop(REMOVAL + key, None)
            shown.pop(key, None)
        for key in claimed:
            merged[key].CopyFrom(asked.net_devices[key])
            shown[key].CopyFrom(asked.net_devices[key])
        for key in gone - claimed:
            merged[REMOVAL + key].SetInParent()

    def _add_args(self, plugin: str, asked: Iterable[str]) -> None:
        """Set the command line. A first argument of "" says that the plugin replaces that of another plugin."""
        args = list(asked)
        if not args:
            return
        if not args[0]:
            del args[0]
            self.ownership.clear(plugin, self._id, Field.Args)
        if not args:
            raise InvalidArgumentError(f"NRI plugin {plugin} leaves container {self._id} without a command")
        self._claim(plugin, Field.Args)
        for target in (self.adjustment.args, self._request.container.args):
            _replace(target, args)

    def _add_hooks(self, plugin: str, asked: nri.Hooks) -> None:
        """Append hooks. Every plugin may add some."""
        if not any(getattr(asked, name) for name in _HOOKS):
            return
        self.ownership.join(plugin, self._id, Field.OciHooks)
        for name in _HOOKS:
            for hooks in (self.adjustment.hooks, self._request.container.hooks):
                getattr(hooks, name).extend(getattr(asked, name))

    def _add_namespaces(self, plugin: str, asked: Iterable[nri.LinuxNamespace]) -> None:
        """Set or remove namespaces. To remove one is a claim too: another plugin cannot set it then."""
        shown = self._request.container.linux.namespaces
        items = list(asked)
        changed: set[str] = set()
        for namespace in items:
            kind = removed(namespace.type) or namespace.type
            if kind in ("", REMOVAL):
                raise InvalidArgumentError(
                    f"NRI plugin {plugin} adjusts a namespace of container {self._id} without a type"
                )
            self._claim(plugin, Field.Namespace, kind)
            changed.add(kind)
        self.adjustment.linux.namespaces.extend(items)
        added = [one for one in items if removed(one.type) is None]
        _replace(shown, [*(one for one in shown if one.type not in changed), *added])

    def _add_rdt(self, plugin: str, asked: nri.LinuxRdt) -> None:
        merged, shown = self.adjustment.linux.rdt, self._request.container.linux.rdt
        if asked.remove:
            for field in _RDT.values():
                self.ownership.clear(plugin, self._id, field)
            for rdt in (merged, shown):
                rdt.Clear()
            merged.remove = True
        for name, field in _RDT.items():
            if asked.HasField(name):
                self._claim(plugin, field)
                for rdt in (merged, shown):
                    getattr(rdt, name).CopyFrom(getattr(asked, name))


def _path_name(path: str) -> str:
    """The path that owns: "/a/" and "/a" are one. The mark of a removal stays."""
    key = removed(path)
    name = path if key is None else key
    return ("" if key is None else REMOVAL) + (os.path.normpath(name) if name else "")


def _replace(items: MutableSequence[Item], wanted: list[Item]) -> None:
    """Make a repeated field have these items."""
    del items[:]
    items.extend(wanted)
