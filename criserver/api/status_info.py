"""The ``info`` of a verbose Status: what `crictl info` shows beside the conditions, under containerd's names.

Installers and network plugins read some of these fields of containerd. docs/node-tools.md says who reads which one. A
field that has no meaning here, such as containerd's ``sandboxImage``, is left out.
"""

from __future__ import annotations

import json
from typing import Any

from criserver.api import views
from criserver.errors import FailedPreconditionError
from criserver.network import NetworkConfig
from criserver.runtime import apparmor, host, selinux
from criserver.runtime.node import Node

# The name of a pod's interface on its CNI network.
_IFNAME = "eth0"


def status_info(node: Node) -> dict[str, str]:
    """Each key with its text: ``info`` is criserver's own, the others are containerd's."""
    try:
        network, load_status = node.network.config(), "OK"
    except FailedPreconditionError as e:
        network, load_status = None, f"cni config load failed: {e}"
    return {
        **_own(node),
        "config": json.dumps(_config(node)),
        "cniconfig": json.dumps(_cni_config(node, network)),
        "lastCNILoadStatus": load_status,
        "lastCNILoadStatus.default": load_status,
    }


def _own(node: Node) -> dict[str, str]:
    config, loaded = node.config, host.apparmor_profiles()
    default = apparmor.DEFAULT if loaded and apparmor.DEFAULT in loaded else apparmor.UNCONFINED
    return views.info(
        root=config.root,
        state=config.state,
        cgroupDriver=config.cgroup_driver,
        # None where the kernel has no AppArmor.
        defaultAppArmorProfile=None if loaded is None else default,
        selinux=selinux.is_enabled(),
    )


def _config(node: Node) -> dict[str, Any]:
    config = node.config
    systemd = config.cgroup_driver == "systemd"
    return {
        "rootDir": config.root,
        "stateDir": config.state,
        # minikube reads it here, newer versions in the options of a runtime.
        "systemdCgroup": systemd,
        "enableSelinux": selinux.labels_containers(),
        "enableCDI": True,
        "cdiSpecDirs": list(config.cdi_dirs),
        "enableUnprivilegedPorts": config.enable_unprivileged_ports,
        "enableUnprivilegedICMP": config.enable_unprivileged_icmp,
        "registry": {"configPath": config.registry_config_path},
        "cni": {
            "binDir": config.cni_bin_dirs[0] if config.cni_bin_dirs else "",
            "binDirs": list(config.cni_bin_dirs),
            "confDir": config.cni_conf_dir,
            "maxConfNum": 1,
        },
        "containerd": {
            "snapshotter": "overlayfs",
            "defaultRuntimeName": config.default_runtime,
            "runtimes": {
                name: {"options": {"BinaryName": handler.path, "SystemdCgroup": systemd}}
                for name, handler in config.runtimes.items()
            },
        },
    }


def _cni_config(node: Node, network: NetworkConfig | None) -> dict[str, Any]:
    """In the form of go-cni's ConfigResult. The loopback interface is no network here, as it needs no plugin."""
    return {
        "PluginDirs": list(node.config.cni_bin_dirs),
        "PluginConfDir": node.config.cni_conf_dir,
        "PluginMaxConfNum": 1,
        "Prefix": "eth",
        "Networks": [] if network is None else [{"Config": _network(network), "IFName": _IFNAME}],
    }


def _network(network: NetworkConfig) -> dict[str, Any]:
    document = {"cniVersion": network.cni_version, "name": network.name, "plugins": network.plugins}
    return {
        "Name": network.name,
        "CNIVersion": network.cni_version,
        "Plugins": [{"Network": plugin, "Source": json.dumps(plugin)} for plugin in network.plugins],
        "Source": json.dumps(document),
    }
