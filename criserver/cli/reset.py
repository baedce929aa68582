"""``criserver reset``: an operator takes a node's pods down, before it is given up or gets another runtime."""

from __future__ import annotations

import os
import sys

from criserver import logs
from criserver import reset as node_reset
from criserver.config import Config
from criserver.errors import FailedPreconditionError


def reset(config: Config, *, grace: float, everything: bool, yes: bool) -> int:
    """Reset the node and say what was done; 1 where something is left of it, or where the answer is no.

    Raises FailedPreconditionError where there is nobody to ask, where a daemon runs, and without root.
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
            "criserver: the node is not clean. A process that does not end waits in the kernel, mostly for a disk or "
            "network file system; when that is back, or after a reboot, run `criserver reset` again",
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
