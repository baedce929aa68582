"""The files of registries: the node's credentials, and the hosts.toml of each registry."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, ok, warning
from criserver.config import Config
from criserver.errors import CriError
from criserver.images.credentials import load_docker_config
from criserver.images.hosts import hosts_for, unknown_keys


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """Faults of these files. Pods whose images are on the node, or are pulled without these files, still run."""
    yield from _auth_file(host, config.registry_auth_file)
    files = 0
    for directory in filter(None, config.registry_config_path.split(":")):
        for path in sorted(glob.glob(os.path.join(glob.escape(host.path(directory)), "*", "hosts.toml"))):
            files += 1
            yield from _hosts(path)
    yield ok(f"{files} hosts.toml in {config.registry_config_path}" if files else "no hosts.toml")


def _auth_file(host: ExaminedNode, path: str) -> Iterator[Finding]:
    if path and not os.path.exists(host.path(path)):
        yield warning(
            f"registry.auth_file = {path}: there is no such file, so pulls have no credentials of the node",
            "write the file, or take the key out of the configuration",
        )
    elif path and host.privileged:
        try:
            load_docker_config(host.path(path))
        except CriError as e:
            yield warning(f"{e}: all pulls without credentials of their own fail", "mend the file")


def _hosts(path: str) -> Iterator[Finding]:
    directory, name = os.path.split(os.path.dirname(path))
    try:
        hosts_for(name, directory)
        with open(path, "rb") as f:
            unknown = unknown_keys(f.read())
    except (CriError, ValueError) as e:
        yield warning(f"{e}: pulls from this registry fail", "mend the file, or remove it")
        return
    except PermissionError:
        return  # only root may read it
    for key in unknown:
        yield warning(f"{path}: unknown key {key}, which has no effect", "look whether it is misspelt")
