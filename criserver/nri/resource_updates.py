"""The updates of containers that plugins ask for, merged."""

from __future__ import annotations

from collections.abc import Sequence

from criserver.nri.ownership import Ownership
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

Response = (
    nri.CreateContainerResponse
    | nri.UpdateContainerResponse
    | nri.StopContainerResponse
    | nri.SynchronizeResponse
    | nri.UpdateContainersRequest
)


class ResourceUpdates:
    """What plugins answer to an UpdateContainer or StopContainer, or send as updates of their own.

    Call :meth:`add` with the response of each plugin, in the order of the plugins.
    """

    def __init__(self, request: nri.UpdateContainerRequest | None = None, ownership: Ownership | None = None) -> None:
        self.ownership = ownership or Ownership()
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

        Raises FailedPreconditionError for a value that another plugin has set, unless the update says that its failure
        is to be ignored: then the whole update of that container is left out. Raises InvalidArgumentError for an
        update without a container. Nothing of the response has been taken then.
        """
        raise NotImplementedError
