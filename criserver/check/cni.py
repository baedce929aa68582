"""The pod network: its configuration, its plugins, and the parts of the kernel that they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from criserver.check import advisories
from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config
from criserver.errors import FailedPreconditionError
from criserver.network.cni_config import CniConfigDirectory, NetworkConfig

# The kinds of network interfaces that each plugin of the CNI project makes.
_LINKS = {
    "bridge": ("bridge", "veth"),
    "ptp": ("veth",),
    "macvlan": ("macvlan",),
    "ipvlan": ("ipvlan",),
    "vlan": ("vlan",),
}
_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_BRIDGE = "/proc/sys/net/bridge/bridge-nf-call-iptables"


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """The network that pods get, and whether the node forwards packets."""
    try:
        network = CniConfigDirectory(host.path(config.cni_conf_dir)).current()
    except FailedPreconditionError as e:
        yield missing(
            str(e),
            "until then only pods on the host's network run. A cluster's network add-on installs its file itself. For "
            "a node without a cluster there is an example, 10-bridge.conflist",
        )
    else:
        yield from _network(host, config, network)
    yield from _forwarding(host)


def _network(host: ExaminedNode, config: Config, network: NetworkConfig) -> Iterator[Finding]:
    types = [plugin["type"] for plugin in network.plugins]
    # A plugin calls another one (ipam) for addresses. Without this check its absence would show at the first pod only.
    types += [plugin["ipam"]["type"] for plugin in network.plugins if plugin.get("ipam", {}).get("type")]
    absent = [
        name
        for name in dict.fromkeys(types)
        if not any(os.access(host.path(os.path.join(d, name)), os.X_OK) for d in config.cni_bin_dirs)
    ]
    if absent:
        yield missing(
            f"network {network.name} ({network.source}) needs the plugin{'s' * (len(absent) > 1)} "
            f"{', '.join(absent)}, not in {' or '.join(config.cni_bin_dirs)}",
            "install the network add-on that brings it, or containernetworking-plugins, or add its directory to "
            "bin_dirs below [cni]",
        )
    elif host.privileged and (words := host.network(config)):
        yield missing(f"network {network.name} ({network.source}): {words}")
    else:
        yield ok(f"network {network.name} ({network.source}) with the plugins {', '.join(dict.fromkeys(types))}")
    if any(plugin["type"] == "portmap" and plugin.get("backend") == "nftables" for plugin in network.plugins):
        yield from _portmap(host, config)
    for kind in dict.fromkeys(kind for name in types for kind in _LINKS.get(name, ())):
        if host.privileged and (words := host.link(kind)):
            yield missing(
                f"the kernel makes no {kind} interfaces: {words}", f"modprobe {kind}, or use a kernel with that module"
            )
    if any(_needs_iptables(plugin) for plugin in network.plugins):
        yield from _iptables(host)


def _portmap(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """Known faults of the plugin portmap. Its one advisory concerns the backend nftables."""
    paths = [host.path(os.path.join(directory, "portmap")) for directory in config.cni_bin_dirs]
    path = next((path for path in paths if os.access(path, os.X_OK)), None)
    if path is None or (told := host.plugin_version(path)) is None:
        return
    for advisory in advisories.of(told):
        yield warning(f"{told} may have {', '.join(advisory.ids)}: {advisory.words}", advisory.advice)


def _needs_iptables(plugin: Mapping[str, Any]) -> bool:
    if "nftables" in (plugin.get("backend"), plugin.get("ipMasqBackend")):
        return False
    return plugin["type"] in ("portmap", "firewall") or plugin.get("ipMasq") is True


def _iptables(host: ExaminedNode) -> Iterator[Finding]:
    program = host.which("iptables")
    if program is None:
        yield missing(
            "the program iptables is not there; the network's plugins run it for masquerading and host ports",
            "apt-get install iptables",
        )
    elif host.privileged and (words := host.iptables(program)):
        yield missing(
            f"{program} does not work: {words}",
            "modprobe nf_tables (or ip_tables, iptable_nat for iptables-legacy), or use a kernel with these",
        )
    else:
        yield ok(f"{program} works")


def _forwarding(host: ExaminedNode) -> Iterator[Finding]:
    if host.read(_FORWARD) == "1":
        yield ok("the node forwards packets")
    else:
        yield warning(
            "net.ipv4.ip_forward is not 1: pods reach no address outside this node, and kubeadm's preflight fails",
            "echo net.ipv4.ip_forward=1 > /etc/sysctl.d/99-kubernetes.conf; sysctl --system",
        )
    # Only bridge networks need it, and not with every mode of kube-proxy. Most guides ask for it.
    if (value := host.read(_BRIDGE)) is None:
        yield warning(
            "the module br_netfilter is not loaded: Services do not work between pods of one node on a bridge network",
            "echo br_netfilter > /etc/modules-load.d/kubernetes.conf; modprobe br_netfilter",
        )
    elif value != "1":
        yield warning(
            "net.bridge.bridge-nf-call-iptables is not 1: Services do not work between pods of one node on a bridge "
            "network",
            "echo net.bridge.bridge-nf-call-iptables=1 >> /etc/sysctl.d/99-kubernetes.conf; sysctl --system",
        )
    else:
        yield ok("bridged packets pass the node's iptables rules")
