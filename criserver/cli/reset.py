"""``criserver reset``: removes all pods of a node, before the node goes away or gets another runtime."""

from __future__ import annotations

import os
import sys

from criserver import logs
from criserver import reset as node_reset
from criserver.config import Config
from criserver.errors import FailedPreconditionError


def reset(config: Config, *, grace: float, everything: bool, yes: bool) -> int:
    """Reset the node and print what was done. Returns 1 if something is left, or if the operator does not agree.

    Raises FailedPreconditionError without a terminal to ask at, while a daemon runs, and without root.
    """
    if os.geteuid() != 0:
        raise FailedPreconditionError("reset must be run as root: it ends containers and unmounts")
    logs.set_up("warning", "auto")
    outcome = node_reset.run(
        config, grace=grace, everything=everything, agreed=lambda pods, containers: yes or _asked(pods, containers)
    )
    if outcome is None:
        print("nothing was done")
        return 1
    for words in outcome.failures:
        print(f"warning: {words}", file=sys.stderr)
    for words in outcome.left:
        print(f"left: {words}", file=sys.stderr)
    if outcome.left:
        print(
            "criserver: the node is not clean. A process that does not end usually waits in the kernel for a disk or a "
            "network file system. Run `criserver reset` again when that works, or after a reboot",
            file=sys.stderr,
        )
        return 1
    print(f"removed {_counted(outcome.pods, 'pod')} and {_counted(outcome.containers, 'container')}")
    return 0


def _asked(pods: int, containers: int) -> bool:
    if not sys.stdin.isatty():
        raise FailedPreconditionError("reset asks before it ends pods, and there is no terminal to ask at; give --yes")
    question = (
        f"{_counted(pods, 'pod')} with {_counted(containers, 'container')} will be ended and removed. Go on? [y/N] "
    )
    return input(question).strip().lower() in ("y", "yes")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
