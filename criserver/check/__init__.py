"""``criserver check``: what this node lacks before pods can run on it, and what to do about each thing.

Facts are looked at or tried, not concluded from version numbers, but for the faults that some versions are known for.
What is tried is undone, and done in namespaces of its own where that is possible, so that a check may run at any time,
also beside a daemon that serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from criserver.check import cgroups, cni, directories, kernel, permissions, programs, service, trial
from criserver.check.finding import Finding, Level, missing
from criserver.check.host import Host
from criserver.config import Config
from criserver.errors import CriError

__all__ = ["Finding", "Host", "Level", "able", "run"]

# In the order in which an operator mends things: what comes first may be why something further down fails.
_CHECKS: Sequence[tuple[str, Callable[[Host, Config], Iterable[Finding]]]] = (
    ("permissions", permissions.check),
    ("kernel", kernel.check),
    ("cgroups", cgroups.check),
    ("runtimes", programs.check),
    ("network", cni.check),
    ("directories", directories.check),
    ("service", service.check),
)


def run(config: Config, host: Host) -> list[Finding]:
    """Everything that was found, named by the part it belongs to.

    A trial container comes last, where nothing that it needs is missing: a network is not among that.
    """
    found: list[Finding] = []
    for name, check in _CHECKS:
        found += _named(name, check, host, config)
    if host.privileged and able(finding for finding in found if finding.check != "network"):
        found += _named("trial", trial.check, host, config)
    return found


def able(found: Iterable[Finding]) -> bool:
    """Whether pods can run: warnings do not count."""
    return not any(finding.level is Level.MISSING for finding in found)


def _named(
    name: str, check: Callable[[Host, Config], Iterable[Finding]], host: Host, config: Config
) -> Iterable[Finding]:
    found: list[Finding] = []
    try:
        for finding in check(host, config):
            found.append(dataclasses.replace(finding, check=name))  # noqa: PERF401 - what came before a failure counts
    except (CriError, OSError) as e:
        found.append(dataclasses.replace(missing(f"cannot be looked at: {e}"), check=name))
    return found
