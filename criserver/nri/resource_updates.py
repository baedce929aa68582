"""The updates of containers that plugins ask for, merged; and how resources are merged in NRI."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
from google.protobuf.message import Message

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.nri.ownership import Field, Ownership
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

log = structlog.get_logger(__name__)

Response = (
    nri.CreateContainerResponse
    | nri.UpdateContainerResponse
    | nri.StopContainerResponse
    | nri.SynchronizeResponse
    | nri.UpdateContainersRequest
)

_MEMORY = {
    "limit": Field.MemLimit,
    "reservation": Field.MemReservation,
    "swap": Field.MemSwapLimit,
    "kernel": Field.MemKernelLimit,
    "kernel_tcp": Field.MemTCPLimit,
    "swappiness": Field.MemSwappiness,
    "disable_oom_killer": Field.MemDisableOomKiller,
    "use_hierarchy": Field.MemUseHierarchy,
}
_CPU = {
    "shares": Field.CPUShares,
    "quota": Field.CPUQuota,
    "period": Field.CPUPeriod,
    "realtime_runtime": Field.CPURealtimeRuntime,
    "realtime_period": Field.CPURealtimePeriod,
    "cpus": Field.CPUSetCPUs,
    "mems": Field.CPUSetMems,
}
_MAX_PAGE_SIZES = 100
_CLASSES = {"blockio_class": Field.BlockioClass, "rdt_class": Field.RdtClass, "pids": Field.PidsLimit}


def claim_resources(claim: Callable[[nri.Field, str], None], asked: nri.LinuxResources) -> None:
    """Call ``claim`` with every field that ``asked`` sets, and its key."""
    for part, fields in ((asked.memory, _MEMORY), (asked.cpu, _CPU), (asked, _CLASSES)):
        for name in _set_fields(part, fields):
            claim(fields[name], "")
    for limit in asked.hugepage_limits:
        claim(Field.HugepageLimits, limit.page_size)
    for key in sorted(asked.unified):
        claim(Field.CgroupsUnified, key)


def merge_resources(into: nri.LinuxResources, asked: nri.LinuxResources) -> None:
    """Set in ``into`` what ``asked`` sets. A limit of huge pages replaces that of its page size.

    protobuf's own merge would leave a value as it is where the new one is 0. Raises InvalidArgumentError for more sizes
    of huge pages than any processor has.
    """
    parts: tuple[tuple[Message, Message, dict[str, nri.Field]], ...] = (
        (into.memory, asked.memory, _MEMORY),
        (into.cpu, asked.cpu, _CPU),
        (into, asked, _CLASSES),
    )
    for target, part, fields in parts:
        for name in _set_fields(part, fields):
            value = getattr(part, name)
            if isinstance(value, str):
                setattr(target, name, value)
            else:
                getattr(target, name).CopyFrom(value)
    if asked.hugepage_limits:
        changed = {limit.page_size: limit for limit in asked.hugepage_limits}
        kept = [one for one in into.hugepage_limits if one.page_size not in changed]
        del into.hugepage_limits[:]
        into.hugepage_limits.extend([*kept, *changed.values()])
        if len(into.hugepage_limits) > _MAX_PAGE_SIZES:
            raise InvalidArgumentError(
                f"plugins set limits for more than {_MAX_PAGE_SIZES} sizes of huge pages of a container"
            )
    # Even an empty list would make the message ``into`` present in its own.
    if asked.unified:
        into.unified.update(asked.unified)
    if asked.devices:
        into.devices.extend(asked.devices)


def _set_fields(message: Message, fields: dict[str, nri.Field]) -> list[str]:
    """The names in ``fields`` that the message sets: a text that is not empty, or a message."""
    found = {field.name for field, _ in message.ListFields()}
    return [name for name in fields if name in found]


class ResourceUpdates:
    """What plugins answer to an UpdateContainer or StopContainer, or send as updates of their own.

    Call :meth:`add` with the response of each plugin, in the order of the plugins. ``created`` is the container that is
    being created: it has adjustments, and can have no update.
    """

    def __init__(
        self,
        request: nri.UpdateContainerRequest | None = None,
        *,
        created: str = "",
        ownership: Ownership | None = None,
    ) -> None:
        self.ownership = ownership or Ownership()
        self._created = created
        self._request = nri.UpdateContainerRequest()
        if request is not None:
            self._request.CopyFrom(request)
        self._updates: dict[str, nri.ContainerUpdate] = {}
        self._evictions: dict[str, nri.ContainerEviction] = {}

    @property
    def request(self) -> nri.UpdateContainerRequest:
        """A copy of the request with the changes so far: what the next plugin gets."""
        copy = nri.UpdateContainerRequest()
        copy.CopyFrom(self._request)
        return copy

    @property
    def resources(self) -> nri.LinuxResources:
        """The resources for the request's own container: the asked ones with the changes of plugins."""
        return self.request.linux_resources

    @property
    def updates(self) -> Sequence[nri.ContainerUpdate]:
        """The updates of other containers, one a container, in the order in which plugins first named them."""
        return list(self._updates.values())

    @property
    def evictions(self) -> Sequence[nri.ContainerEviction]:
        """The containers to evict, each once, with the first reason."""
        return list(self._evictions.values())

    def add(self, plugin: str, response: Response) -> None:
        """Take the response of ``plugin``.

        Raises FailedPreconditionError for a value that another plugin has set. The whole update of one container is
        left out instead where it says that its failure is to be ignored. Raises InvalidArgumentError for an update that
        can never be right.
        """
        for update in response.update:
            self._check(plugin, update)
            try:
                self._add(plugin, update)
            except FailedPreconditionError as e:
                if not update.ignore_failure:
                    raise
                log.info("an update of a plugin is left out", plugin=plugin, error=str(e))
        evictions = () if isinstance(response, nri.StopContainerResponse | nri.SynchronizeResponse) else response.evict
        for eviction in evictions:
            if not eviction.container_id:
                raise InvalidArgumentError(f"NRI plugin {plugin} evicts a container without naming it")
            if eviction.container_id not in self._evictions:
                self._evictions[eviction.container_id] = nri.ContainerEviction()
                self._evictions[eviction.container_id].CopyFrom(eviction)

    def _check(self, plugin: str, update: nri.ContainerUpdate) -> None:
        if not update.container_id:
            raise InvalidArgumentError(f"NRI plugin {plugin} updates a container without naming it")
        if update.container_id == self._created:
            raise InvalidArgumentError(
                f"NRI plugin {plugin} updates container {self._created} during its creation; adjust it instead"
            )
        if update.linux.resources.devices:
            raise InvalidArgumentError(
                f"NRI plugin {plugin} updates the devices of container {update.container_id}: only an adjustment at "
                "CreateContainer can give it devices"
            )

    def _add(self, plugin: str, update: nri.ContainerUpdate) -> None:
        container_id, asked = update.container_id, update.linux.resources
        wanted: list[tuple[nri.Field, str]] = []
        claim_resources(lambda field, key: wanted.append((field, key)), asked)
        self.ownership.claim_all(plugin, container_id, wanted)
        if container_id == self._request.container.id:
            merge_resources(self._request.linux_resources, asked)
            return
        known = self._updates.get(container_id)
        if known is None:
            known = nri.ContainerUpdate(container_id=container_id, ignore_failure=True)
            self._updates[container_id] = known
        known.ignore_failure = known.ignore_failure and update.ignore_failure
        merge_resources(known.linux.resources, asked)
