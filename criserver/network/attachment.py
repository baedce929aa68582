"""A pod on a network, with everything that its plugins need to undo it (CNI specification 1.1, section 2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from criserver.network.cni_config import NetworkConfig
from criserver.network.cni_result import CniResult, stored


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod on a network: planned while ``result`` is None, added when it has a result."""

    network: NetworkConfig
    container_id: str
    netns: str
    ifname: str
    args: str
    capabilities: Mapping[str, Any]
    result: CniResult | None = None

    @property
    def ips(self) -> tuple[str, ...]:
        """The pod's addresses, the primary one first. Empty before the attachment is added."""
        return self.result.ips if self.result else ()

    def to_json(self) -> str:
        """The attachment as text, for the database."""
        return json.dumps(
            {
                "network": {
                    "name": self.network.name,
                    "cniVersion": self.network.cni_version,
                    "plugins": self.network.plugins,
                    "disableCheck": self.network.disable_check,
                    "source": self.network.source,
                },
                "containerID": self.container_id,
                "netns": self.netns,
                "ifname": self.ifname,
                "args": self.args,
                "capabilities": self.capabilities,
                "result": self.result.raw if self.result else None,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Attachment:
        """The attachment in the text of :meth:`to_json`."""
        document = json.loads(text)
        network, result = document["network"], document["result"]
        version, ifname = network["cniVersion"], document["ifname"]
        return cls(
            network=NetworkConfig(
                name=network["name"],
                cni_version=version,
                plugins=tuple(network["plugins"]),
                disable_check=network["disableCheck"],
                source=network["source"],
            ),
            container_id=document["containerID"],
            netns=document["netns"],
            ifname=ifname,
            args=document["args"],
            capabilities=document["capabilities"],
            result=None if result is None else stored(result, ifname=ifname, version=version),
        )
