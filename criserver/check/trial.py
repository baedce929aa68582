"""A trial: each runtime handler runs a container with the configured cgroup driver."""

from __future__ import annotations

import os
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """One container for each handler whose program exists. A shim needs a daemon, and is not tried.

    The containers run the infra program, as it needs no other file. Without it there is no trial.
    """
    runtimes = [r for r in config.runtimes.values() if not r.shim and host.which(r.path) is not None]
    if runtimes and not os.access(host.path(config.infra), os.X_OK):
        yield warning(
            f"no container was tried: it would run {config.infra}, which is not an executable",
            "install catatonit (apt-get install catatonit), and check again",
        )
        return
    for runtime in runtimes:
        words = host.container(config, runtime.name)
        if words is None:
            yield ok(f"a container was run by {runtime.name}")
        else:
            grave = missing if runtime.name == config.default_runtime else warning
            yield grave(
                f"{runtime.name} cannot run a container here: {words}",
                "the message is the OCI runtime's own; with the driver systemd, see journalctl -e too",
            )
