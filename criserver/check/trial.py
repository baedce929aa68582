"""The proof: a container is run and ended, by each runtime handler and the configured cgroup driver."""

from __future__ import annotations

from collections.abc import Iterator

from criserver.check.finding import Finding, missing, ok, warning
from criserver.check.host import Host
from criserver.config import Config


def check(host: Host, config: Config) -> Iterator[Finding]:
    """One container for each handler whose program is there."""
    for runtime in config.runtimes.values():
        if host.which(runtime.path) is None:
            continue
        words = host.container(config, runtime.name)
        if words is None:
            yield ok(f"a container was run by {runtime.name}")
        else:
            grave = missing if runtime.name == config.default_runtime else warning
            yield grave(
                f"{runtime.name} runs no container here: {words}",
                "the runtime's own words say what it could not do; with the driver systemd, see journalctl -e too",
            )
