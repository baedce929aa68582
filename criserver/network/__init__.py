"""A pod's namespaces and its place in the node's CNI network."""

from __future__ import annotations

from criserver.network.attachment import Attachment
from criserver.network.cni_config import NetworkConfig
from criserver.network.cni_network import Network
from criserver.network.pod_network import PodNetwork

__all__ = ["Attachment", "Network", "NetworkConfig", "PodNetwork"]
