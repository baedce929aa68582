"""An adjustment as a message -> as a value for the OCI spec."""

from __future__ import annotations

from criserver.oci.spec_adjustment import SpecAdjustment
from criserver.pb.nri.v1alpha1 import api_pb2 as nri


def spec_adjustment(
    container_id: str, adjustment: nri.ContainerAdjustment, owners: nri.OwningPlugins
) -> SpecAdjustment:
    """The value. ``owners`` are named in errors. Raises InvalidArgumentError for what no OCI spec can have."""
    raise NotImplementedError


def resources(asked: nri.LinuxResources) -> dict[str, object]:
    """The OCI ``linux.resources`` of an update, without unset values."""
    raise NotImplementedError
