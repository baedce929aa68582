"""A pod's namespaces and its place in the node's CNI network."""

from __future__ import annotations

from criserver.network.cni import Attachment, Network
from criserver.network.pod import PodNetwork, PortMapping

__all__ = ["Attachment", "Network", "PodNetwork", "PortMapping"]
