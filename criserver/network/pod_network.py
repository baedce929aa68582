"""The values of a pod for CNI plugins: CNI_ARGS and capability arguments (CNI CONVENTIONS.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from criserver.errors import InvalidArgumentError
from criserver.model import PortMapping
from criserver.text import quoted

_BANDWIDTH = {"ingress": "kubernetes.io/ingress-bandwidth", "egress": "kubernetes.io/egress-bandwidth"}
# Bits. The annotations have only a rate. With the largest burst of the plugin's field, only the rate limits.
_BURST = 2**32 - 1
# Bits per second, the bounds of Kubernetes.
_MIN_RATE, _MAX_RATE = 10**3, 10**15

_QUANTITY = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d{1,2}))?", re.ASCII)
_SCALES = {
    **{suffix: Fraction(1000) ** (i - 3) for i, suffix in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"))},
    **{suffix: Fraction(1024) ** i for i, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
}

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """A pod for the network: its identity, the path of its network namespace and its requests."""

    sandbox_id: str
    netns: str
    name: str
    namespace: str
    uid: str
    ifname: str = "eth0"
    port_mappings: tuple[PortMapping, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    dns_servers: tuple[str, ...] = ()
    dns_searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    cgroup_parent: str = ""

    def cni_args(self) -> str:
        """The value of CNI_ARGS. Raises InvalidArgumentError for characters that CNI_ARGS cannot have."""
        if not _CONTAINER_ID.fullmatch(self.sandbox_id):
            raise InvalidArgumentError(f"sandbox id {quoted(self.sandbox_id)} is not a valid CNI container id")
        pairs = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": self.namespace,
            "K8S_POD_NAME": self.name,
            "K8S_POD_INFRA_CONTAINER_ID": self.sandbox_id,
            "K8S_POD_UID": self.uid,
        }
        for key, value in pairs.items():
            if set(value) & set(";=\0"):
                raise InvalidArgumentError(f"{key} = {quoted(value)} must not contain ';', '=' or NUL")
        return ";".join(f"{key}={value}" for key, value in pairs.items())

    def capability_args(self) -> dict[str, Any]:
        """The capability arguments of the pod by name, without empty ones.

        Raises InvalidArgumentError for a bandwidth annotation that is not a valid Kubernetes quantity.
        """
        dns = {"servers": self.dns_servers, "searches": self.dns_searches, "options": self.dns_options}
        args = {
            "portMappings": [_port_mapping(p) for p in self.port_mappings if p.host_port],
            "bandwidth": _bandwidth(self.annotations),
            "dns": {key: list(value) for key, value in dns.items() if value},
            "cgroupPath": self.cgroup_parent,
            "io.kubernetes.cri.pod-annotations": dict(self.annotations),
        }
        return {name: value for name, value in args.items() if value}


def _port_mapping(port: PortMapping) -> dict[str, Any]:
    mapping = {"hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol}
    return {**mapping, "hostIP": port.host_ip} if port.host_ip else mapping


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    limits = {}
    for direction, annotation in _BANDWIDTH.items():
        if annotation not in annotations:
            continue
        text = annotations[annotation]
        rate = _quantity(text)
        if rate is None or not _MIN_RATE <= rate <= _MAX_RATE:
            raise InvalidArgumentError(
                f"annotation {annotation} = {quoted(text)} must be a quantity of bits per second from 1k to 1P"
            )
        limits[f"{direction}Rate"] = rate
        limits[f"{direction}Burst"] = _BURST
    return limits


def _quantity(text: str) -> int | None:
    """The value of a Kubernetes quantity, rounded up; None for another text, and for more than 64 characters."""
    match = _QUANTITY.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        return None
    sign, digits, suffix, exponent = match.groups()
    scale = Fraction(10) ** int(exponent) if exponent else _SCALES[suffix or ""]
    value = math.ceil(Fraction(digits) * scale)
    return -value if sign == "-" else value
