"""The kubelet on PATH: its configuration, and one without an API server."""

from __future__ import annotations

import glob
import json
import os
import subprocess
from typing import Any

from tests.support import https
from tests.support.registry import free_port
from tests.support.waiting import end


def configuration(socket: str, manifests: str, **settings: Any) -> dict[str, Any]:
    """A KubeletConfiguration, for the daemon at ``socket`` and static pods in ``manifests``.

    ``settings`` are fields of it, also in place of those here.
    """
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{socket}",
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "staticPodPath": manifests,
        "fileCheckFrequency": "2s",
        "address": "127.0.0.1",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        **settings,
    }


def beside_others(directory: str) -> dict[str, Any]:
    """Settings for a machine that is no node: the kubelet's files are in ``directory``, and it limits nothing there."""
    return {
        "failCgroupV1": False,
        "enforceNodeAllocatable": [],
        "podLogsDir": f"{directory}/logs",
        "volumePluginDir": f"{directory}/plugins",
        "readOnlyPort": 0,
        "healthzPort": 0,
        "oomScoreAdj": 0,
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": False,
    }


def another_runs() -> bool:
    """Whether the machine has the cgroups of a kubelet."""
    return bool(_cgroups("kubepods*"))


def cgroups_of_pods() -> list[str]:
    """The cgroups of pods that a kubelet has made."""
    return _cgroups("kubepods*/*/*pod*")


def remove_cgroups(driver: str) -> None:
    """Remove the cgroups that a kubelet with this driver, cgroupfs or systemd, leaves when it ends."""
    if driver == "systemd":
        subprocess.run(["systemctl", "stop", "kubepods.slice"], check=False)
    if tops := _cgroups("kubepods"):
        command = ["find", *tops, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
        subprocess.run(command, capture_output=True, check=False)


def _cgroups(name: str) -> list[str]:
    return glob.glob(f"/sys/fs/cgroup/*/{name}") + glob.glob(f"/sys/fs/cgroup/{name}")


class StandaloneKubelet:
    """A kubelet without an API server, from its creation to :meth:`end`. It watches ``manifests``.

    ``words`` are options of its command line, ``settings`` those of :func:`configuration`. The node is called ``name``.
    """

    def __init__(self, directory: str, socket: str, name: str, *words: str, **settings: Any) -> None:
        self.directory = directory
        self.manifests = f"{directory}/manifests"
        os.makedirs(self.manifests)
        self._port = settings.setdefault("port", free_port())
        with open(f"{directory}/kubelet.json", "w") as f:
            json.dump(configuration(socket, self.manifests, **settings), f)
        command = ["kubelet", "--config", f"{directory}/kubelet.json", "--root-dir", f"{directory}/root"]
        command += ["--hostname-override", name, *words]
        with open(f"{directory}/log", "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=directory
            )

    def get(self, path: str) -> str:
        """What it answers. Raises OSError, also while it does not serve yet."""
        return https.fetched(f"https://127.0.0.1:{self._port}{path}", 60)

    def log(self) -> str:
        """The end of its log."""
        with open(f"{self.directory}/log", errors="replace") as f:
            return f.read()[-4000:]

    def end(self) -> None:
        """End it. Its pods stay."""
        end(self._process, 60)
