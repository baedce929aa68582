"""The rows of the benchmark, their statistics, and the tables that show them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FLOOR, OURS, PEER = "floor", "criserver", "containerd"
WHO = (FLOOR, OURS, PEER)

# Samples by row, and in a row by contender.
Samples = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Row:
    """One figure that is measured for each contender."""

    name: str
    group: str  # the rows of a group are measured together
    title: str
    unit: str
    goal: float | None = None  # the ratio to containerd
    goal_value: float | None = None  # in the row's unit
    more_is_better: bool = False

    def ratio(self, samples: Mapping[str, Sequence[float]]) -> float | None:
        """Median of criserver divided by the median of containerd."""
        if not samples.get(OURS) or not samples.get(PEER):
            return None
        peer = statistics.median(samples[PEER])
        return statistics.median(samples[OURS]) / peer if peer else None

    def goal_text(self) -> str:
        """The goal as the tables show it; empty for a row without one."""
        if self.goal_value is not None:
            return f"{number(self.goal_value)} {self.unit}"
        return "" if self.goal is None else f"{self.goal:.2f}"

    def reached(self, samples: Mapping[str, Sequence[float]]) -> bool | None:
        """Whether the goal is reached. None without a goal or without samples."""
        if self.goal_value is not None:
            found: float | None = statistics.median(samples[OURS]) if samples.get(OURS) else None
            goal: float | None = self.goal_value
        else:
            found, goal = self.ratio(samples), self.goal
        if found is None or goal is None:
            return None
        # The table shows two digits of a ratio. What it shows is compared.
        return round(found, 2) >= goal if self.more_is_better else round(found, 2) <= goal


ROWS = (
    Row("pod-up", "pods", "pod up: run, create, start", "ms", 0.50),
    Row("pod-down", "pods", "pod down: stop, remove, stop pod, remove pod", "ms", 0.50),
    Row("pod-down-shared", "pods", "pod down, shared PID namespace", "ms", 0.55),
    Row("pods-a-second", "load", "pods up a second, 8 wide", "1/s", 2.2, more_is_better=True),
    Row("exec", "pods", "ExecSync of true", "ms", 0.50),
    Row("execs-a-second", "load", "ExecSync of true a second, 8 wide", "1/s", 1.5, more_is_better=True),
    Row("memory-pod", "standing", "PSS for each of 60 pods", "MiB", 0.18),
    Row("memory-daemon", "standing", "PSS of the daemon and its nursery, 60 pods", "MiB", 0.75),
    Row("container-stats", "standing", "ListContainerStats, 60 pods", "ms", 0.08),
    Row("container-stats-p90", "standing", "ListContainerStats, 60 pods, p90", "ms"),
    Row("pod-stats", "standing", "ListPodSandboxStats, 60 pods", "ms", 0.15),
    Row("pod-stats-p90", "standing", "ListPodSandboxStats, 60 pods, p90", "ms"),
    Row("idle-cpu", "standing", "CPU under a kubelet's polling, 60 pods", "%", 0.09),
    Row("list", "standing", "ListContainers, 60 pods", "ms", 0.80),
    Row("log-time", "logs", "log of 300 MB in lines of 100 bytes", "s", 0.28),
    Row("log-cpu", "logs", "log of 300 MB: CPU of the runtime", "s", 0.20),
    Row("pull-large", "pulls", "pull of 420 MiB in 20 files", "s", 0.33),
    Row("pull-small", "pulls", "pull of 82,000 small files", "s", 0.30),
    Row("status-p99", "load", "Status beside 8 workers, p99", "ms", 0.70),
    Row("list-p99", "load", "ListContainers beside 8 workers, p99", "ms", 0.70),
    Row("restart", "standing", "restart until Version answers, 100 containers", "s", goal_value=0.4),
    # The rows above are those with a goal and their p90. These say where the time goes, or have no goal.
    Row("RunPodSandbox", "pods", "RunPodSandbox", "ms"),
    Row("CreateContainer", "pods", "CreateContainer", "ms"),
    Row("StartContainer", "pods", "StartContainer", "ms"),
    Row("StopContainer", "pods", "StopContainer, timeout 0", "ms"),
    Row("RemoveContainer", "pods", "RemoveContainer", "ms"),
    Row("StopPodSandbox", "pods", "StopPodSandbox", "ms"),
    Row("RemovePodSandbox", "pods", "RemovePodSandbox", "ms"),
    Row("version", "pods", "Version: an RPC alone", "ms"),
    Row("exec-p99", "load", "ExecSync of true beside 8 workers, p99", "ms"),
    Row("status-pull-p99", "load", "Status beside 8 workers and pulls, p99", "ms"),
    Row("list-pull-p99", "load", "ListContainers beside 8 workers and pulls, p99", "ms"),
    Row("exec-pull-p99", "load", "ExecSync of true beside 8 workers and pulls, p99", "ms"),
    Row("pull-zstd", "pulls", "pull of the 420 MiB by zstd", "s"),
    Row("pull-large-cpu", "pulls", "pull of 420 MiB: CPU", "s"),
    Row("pull-small-cpu", "pulls", "pull of 82,000 small files: CPU", "s"),
    Row("pull-large-memory", "pulls", "pull of 420 MiB: peak of PSS above idle", "MiB"),
    Row("pull-small-memory", "pulls", "pull of 82,000 small files: peak of PSS above idle", "MiB"),
    Row("first-byte", "streams", "exec until the first byte", "ms"),
    Row("exec-output", "streams", "output of an exec", "MB/s", more_is_better=True),
    Row("exec-input", "streams", "input of an exec", "MB/s", more_is_better=True),
    Row("port-forward", "streams", "port-forward", "MB/s", more_is_better=True),
    Row("stalled", "streams", "PSS for each client that does not read", "MiB"),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that is not below ``share`` (0 to 1) of them (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def number(value: float) -> str:
    """A figure with three digits that mean something, and no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def cell(values: Sequence[float] | None) -> str:
    """Median, and in brackets minimum and maximum."""
    if not values:
        return "-"
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def lines(samples: Samples, rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The cells of a table: its head, then a line for each row that was measured."""
    found: list[tuple[str, ...]] = [("median (min-max)", "unit", *WHO, "ratio", "goal", "reached")]
    for row in rows:
        if by := samples.get(row.name):
            ratio = row.ratio(by)
            reached = {None: "", True: "yes", False: "no"}[row.reached(by)]
            cells = [cell(by.get(who)) for who in WHO]
            told = "-" if ratio is None else f"{ratio:.2f}"
            found.append((row.title, row.unit, *cells, told, row.goal_text(), reached))
    return found


def text(samples: Samples, rows: Iterable[Row] = ROWS) -> str:
    """The table of all or some rows for a terminal."""
    found = lines(samples, rows)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in found
    )


def markdown(samples: Samples, rows: Iterable[Row]) -> str:
    """A table of some rows for a page."""
    head, *body = lines(samples, rows)
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    made += ["| " + " | ".join(line) + " |" for line in body]
    return "\n".join(made)


def short_markdown(samples: Samples) -> str:
    """The table of medians for the rows that have a goal."""
    made = ["| | bare tools | criserver | containerd | ratio |", "|---|---|---|---|---|"]
    for row in ROWS:
        by = samples.get(row.name)
        if not by or not row.goal_text():
            continue
        cells = [f"{number(statistics.median(by[who]))} {row.unit}" if by.get(who) else "" for who in WHO]
        ratio = row.ratio(by)
        made.append(f"| {row.title} | " + " | ".join(cells) + f" | {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(made)
