"""The adjustments that plugins make to a container before it is created, merged."""

from __future__ import annotations

from criserver.nri.ownership import Ownership
from criserver.nri.resource_updates import ResourceUpdates
from criserver.pb.nri.v1alpha1 import api_pb2 as nri


class ContainerAdjustments:
    """What plugins answer to one CreateContainer.

    Call :meth:`add` with the response of each plugin, in the order of the plugins. ``adjustment`` is the merged one.
    ``updates`` has the updates of other containers, and the evictions.
    """

    def __init__(self, request: nri.CreateContainerRequest) -> None:
        self._original = nri.CreateContainerRequest()
        self._original.CopyFrom(request)
        self._request = nri.CreateContainerRequest()
        self._request.CopyFrom(request)
        self.ownership = Ownership()
        self.adjustment = nri.ContainerAdjustment()
        self.updates = ResourceUpdates(ownership=self.ownership)

    @property
    def request(self) -> nri.CreateContainerRequest:
        """A copy of the request with the container as adjusted so far: what the next plugin gets."""
        copy = nri.CreateContainerRequest()
        copy.CopyFrom(self._request)
        return copy

    @property
    def owners(self) -> nri.OwningPlugins:
        """Who has set what."""
        return self.ownership.message

    def add(self, plugin: str, response: nri.CreateContainerResponse) -> None:
        """Take the response of ``plugin``.

        Raises FailedPreconditionError for a value that another plugin has set, with both names, the field and the
        container. Raises InvalidArgumentError for a response that can never be right. The creation has to fail then.
        """
        raise NotImplementedError

    def validation(self, plugins: list[nri.PluginInstance]) -> nri.ValidateContainerAdjustmentRequest:
        """The request for validators: the container as it was at first, and all that ``plugins`` have asked for."""
        return nri.ValidateContainerAdjustmentRequest(
            pod=self._original.pod,
            container=self._original.container,
            adjust=self.adjustment,
            update=self.updates.updates,
            owners=self.owners,
            plugins=plugins,
        )
