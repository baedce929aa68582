"""What a verbose Status tells, as installers and network plugins read it of containerd."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from criserver.api.status_info import status_info
from criserver.config import load
from criserver.network import Network
from criserver.runtime.node import Node


def told(directory: Path, configuration: str = "") -> dict[str, str]:
    path = directory / "config.toml"
    path.write_text(f'[cni]\nconf_dir = "{directory}/net.d"\n{configuration}')
    network = Network(conf_dir=f"{directory}/net.d", bin_dirs=["/opt/cni/bin"])
    return status_info(cast("Node", SimpleNamespace(config=load(str(path)), network=network)))


def test_a_network_is_told_as_go_cni_writes_it(tmp_path: Path) -> None:
    (tmp_path / "net.d").mkdir()
    plugins = [{"type": "bridge", "ipam": {"type": "host-local"}}, {"type": "portmap"}]
    document = {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}
    (tmp_path / "net.d/10-pods.conflist").write_text(json.dumps(document))
    found = told(tmp_path)
    assert (found["lastCNILoadStatus"], found["lastCNILoadStatus.default"]) == ("OK", "OK")
    config = json.loads(found["cniconfig"])
    assert (config["PluginConfDir"], config["PluginDirs"]) == (f"{tmp_path}/net.d", ["/opt/cni/bin", "/usr/lib/cni"])
    (network,) = config["Networks"]
    assert (network["IFName"], network["Config"]["Name"], network["Config"]["CNIVersion"]) == ("eth0", "pods", "1.0.0")
    assert json.loads(network["Config"]["Source"]) == document
    assert [plugin["Network"]["type"] for plugin in network["Config"]["Plugins"]] == ["bridge", "portmap"]
    assert [json.loads(plugin["Source"]) for plugin in network["Config"]["Plugins"]] == plugins


def test_without_a_network_the_reason_is_told(tmp_path: Path) -> None:
    found = told(tmp_path)
    assert found["lastCNILoadStatus"].startswith("cni config load failed: no CNI configuration in ")
    assert json.loads(found["cniconfig"])["Networks"] == []


def test_the_configuration_has_containerds_names(tmp_path: Path) -> None:
    runtimes = '[runtime]\ncgroup_driver = "systemd"\ndefault = "crun"\nenable_unprivileged_icmp = false\n'
    config: Any = json.loads(told(tmp_path, f'{runtimes}[runtimes.crun]\npath = "/usr/bin/crun"\n')["config"])
    assert config["cni"]["confDir"] == f"{tmp_path}/net.d"
    assert (config["cni"]["binDir"], config["cni"]["binDirs"]) == ("/opt/cni/bin", ["/opt/cni/bin", "/usr/lib/cni"])
    assert config["containerd"]["defaultRuntimeName"] == "crun"
    options = {"BinaryName": "/usr/bin/crun", "SystemdCgroup": True}
    assert config["containerd"]["runtimes"] == {"crun": {"options": options}}
    assert config["systemdCgroup"] is True
    assert (config["enableUnprivilegedPorts"], config["enableUnprivilegedICMP"]) == (True, False)
    assert "sandboxImage" not in config, "a pod has no container of its own, so kubeadm has nothing to compare"
