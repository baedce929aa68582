"""All families in Prometheus' text format, by prometheus-client. It is imported only where metrics are on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client
import structlog
from prometheus_client.core import GaugeMetricFamily

from criserver.telemetry import families
from criserver.telemetry.instruments import Histogram, Instrument, Reading

log = structlog.get_logger(__name__)

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
# Seconds between two measurements of the event loop's lag.
LAG_INTERVAL = 0.5


class Exposition:
    """From its creation to :meth:`close` the instruments of the table count."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second sample for each counter, which nobody reads
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        self._readings: list[GaugeMetricFamily] = []
        self._registry.register(self)
        self._turn = asyncio.Lock()
        for instrument in families.TABLE:
            if not isinstance(instrument, Reading):
                instrument.bind(self._counterpart(instrument))

    def _counterpart(self, instrument: Instrument) -> Any:
        kinds: dict[str, Any] = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        if isinstance(instrument, Histogram):
            return prometheus_client.Histogram(
                instrument.name, instrument.text, instrument.labels, registry=self._registry, buckets=instrument.buckets
            )
        return kinds[instrument.kind](instrument.name, instrument.text, instrument.labels, registry=self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What the registry asks for at a scrape: the readings that :meth:`render` has just taken."""
        yield from self._readings

    async def render(self) -> bytes:
        """The text. What is read from the rooms is read in the loop, and a thread makes the text."""
        async with self._turn:
            found = (_read(i) for i in families.TABLE if isinstance(i, Reading))
            self._readings = [family for family in found if family is not None]
            return await asyncio.to_thread(prometheus_client.generate_latest, self._registry)

    def close(self) -> None:
        """Stop counting."""
        for instrument in families.TABLE:
            instrument.bind(None)


def _read(reading: Reading) -> GaugeMetricFamily | None:
    """One reading. None where it has no source or its source fails: a scrape has all others."""
    if reading.source is None:
        return None
    family = GaugeMetricFamily(reading.name, reading.text, labels=reading.labels)
    try:
        for labels, value in reading.source().items():
            family.add_metric(labels, value)
    except Exception as e:
        log.exception("a metric cannot be read", metric=reading.name, error=str(e))
        return None
    return family


async def measure_lag(sleep: Callable[[float], Any] = asyncio.sleep) -> None:
    """Observe the event loop's lag for ever."""
    while True:
        began = time.monotonic()
        await sleep(LAG_INTERVAL)
        families.LOOP_LAG.observe(max(0.0, time.monotonic() - began - LAG_INTERVAL))
