"""Counters, gauges and histograms that do nothing until metrics are on.

Rooms count with these. They do not know prometheus-client: :mod:`criserver.telemetry.exposition` gives each instrument
its counterpart there, and only where the configuration turns metrics on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

# The value of a bounded label after its limit.
OTHER = "other"

Labels = tuple[str, ...]
Source = Callable[[], Mapping[Labels, float]]


class Instrument:
    """One metric family: its name, its help, the names of its labels.

    ``bounded`` has the most values that a label may have, by the label's name. Later values become ``other``.
    """

    kind: Literal["counter", "gauge", "histogram"]

    def __init__(self, name: str, text: str, *labels: str, bounded: Mapping[str, int] | None = None) -> None:
        self.name = name
        self.text = text
        self.labels = labels
        self.bounded = dict(bounded or {})
        self._real: Any = None
        self._seen: dict[str, set[str]] = {label: set() for label in self.bounded}

    def bind(self, real: Any) -> None:
        """Count with the family ``real`` of prometheus-client from now on; with None do nothing again."""
        self._real = real
        self._seen = {label: set() for label in self.bounded}

    @property
    def is_on(self) -> bool:
        """Whether metrics are on."""
        return self._real is not None

    def _child(self, labels: Labels) -> Any:
        if not self.labels:
            return self._real
        return self._real.labels(*(self._admitted(*pair) for pair in zip(self.labels, labels, strict=True)))

    def _admitted(self, label: str, value: str) -> str:
        seen = self._seen.get(label)
        if seen is None or value in seen:
            return value
        if len(seen) >= self.bounded[label]:
            return OTHER
        seen.add(value)
        return value


class Counter(Instrument):
    """A number that only grows. Its name ends in ``_total``."""

    kind = "counter"

    def add(self, amount: float, *labels: str) -> None:
        """Add ``amount``, which is not negative."""
        if self._real is not None:
            self._child(labels).inc(amount)


class Gauge(Instrument):
    """A number that may fall."""

    kind = "gauge"

    def add(self, amount: float, *labels: str) -> None:
        """Add ``amount``, which may be negative."""
        if self._real is not None:
            self._child(labels).inc(amount)

    def set(self, value: float, *labels: str) -> None:
        """Let ``value`` be the number."""
        if self._real is not None:
            self._child(labels).set(value)


class Reading(Instrument):
    """A gauge that is read at each scrape, from the function that :meth:`read` was given."""

    kind = "gauge"
    source: Source | None = None

    def read(self, source: Source) -> None:
        """Read from ``source``. It returns a number for each combination of labels, and must not block."""
        self.source = source


class Histogram(Instrument):
    """A distribution, by the upper bounds ``buckets`` in ascending order."""

    kind = "histogram"

    def __init__(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...], bounded: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(name, text, *labels, bounded=bounded)
        self.buckets = buckets

    def observe(self, value: float, *labels: str) -> None:
        """Take one value."""
        if self._real is not None:
            self._child(labels).observe(value)
