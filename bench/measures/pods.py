"""The life of one pod at a time, call by call."""

from __future__ import annotations

from bench.lives import Add, nowhere, timed
from bench.run import Run, name_of

_EXECS = 3
_VERSIONS = 20


def measure(run: Run) -> None:
    """Pods of each contender in turn, then pods whose containers share their PID namespace."""
    with run.nodes() as nodes:
        for number, node in run.turns([None, *nodes], warm_up=True):
            add = run.adder(name_of(node)) if number else nowhere
            for life in range(run.sizes.lives):
                pod = run.pod(node, f"pod{number}-{life}")
                pod.up(add)
                for _ in range(_EXECS):
                    pod.exec(add)
                pod.down(add)
            if node:
                for _ in range(_VERSIONS):
                    add("version", timed(node.client.Version)[1])
        for number, node in run.turns(list(nodes), warm_up=True):
            add = _only_down(run.adder(node.name)) if number else nowhere
            for life in range(run.sizes.lives):
                pod = run.pod(node, f"shared{number}-{life}", shared=True)
                pod.up()
                pod.down(add)


def _only_down(add: Add) -> Add:
    """An ``Add`` for the row of a shared PID namespace."""
    return lambda row, value: add("pod-down-shared", value) if row == "pod-down" else None
