"""``criserver check``: what this node lacks before pods can run on it, and what to do about each thing.

The checks read files or try things. They do not conclude from version numbers, except for known faults of some
versions. Each try is undone, and runs in namespaces of its own if possible. So a check may run at any time, also while
a daemon serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from criserver.check import (
    cgroup_driver,
    cni,
    directories,
    kernel,
    permissions,
    programs,
    registries,
    service,
    tracing,
    trial,
    unmet_settings,
)
from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, Level, missing
from criserver.config import Config
from criserver.errors import CriError

__all__ = ["ExaminedNode", "Finding", "Level", "able", "run"]

# In the order in which an operator mends things: an earlier finding may be the cause of a later one.
_CHECKS: Sequence[tuple[str, Callable[[ExaminedNode, Config], Iterable[Finding]]]] = (
    ("permissions", permissions.check),
    ("kernel", kernel.check),
    ("cgroups", cgroup_driver.check),
    ("runtimes", programs.check),
    ("settings", unmet_settings.check),
    ("network", cni.check),
    ("directories", directories.check),
    ("registries", registries.check),
    ("service", service.check),
    ("tracing", tracing.check),
)


def run(config: Config, host: ExaminedNode) -> list[Finding]:
    """All findings, each with the name of its check.

    The last check runs a trial container, if nothing that it needs is missing. It does not need a network.
    """
    found: list[Finding] = []
    for name, check in _CHECKS:
        found += _named(name, check, host, config)
    if host.privileged and able(finding for finding in found if finding.check != "network"):
        found += _named("trial", trial.check, host, config)
    return found


def able(findings: Iterable[Finding]) -> bool:
    """Whether pods can run. Warnings do not prevent it."""
    return not any(finding.level is Level.MISSING for finding in findings)


def _named(
    name: str, check: Callable[[ExaminedNode, Config], Iterable[Finding]], host: ExaminedNode, config: Config
) -> Iterable[Finding]:
    found: list[Finding] = []
    try:
        for finding in check(host, config):
            found.append(dataclasses.replace(finding, check=name))  # noqa: PERF401 - findings before a failure are kept
    except (CriError, OSError) as e:
        found.append(dataclasses.replace(missing(f"this check failed: {e}"), check=name))
    return found
