"""Traces for a collector, by OpenTelemetry's SDK over OTLP and gRPC. It is imported only where tracing is on.

A call becomes spans of the SDK when it is complete. The SDK's own thread sends them. Its queue has a limit: if the
collector is dead, slow or full, spans are lost, and no call is delayed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    SpanKind,
    Status,
    StatusCode,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from criserver import __version__
from criserver.telemetry import spans
from criserver.telemetry.spans import Sample, Span, Trace
from snapshotter.threads import in_loose_thread

log = structlog.get_logger(__name__)

_MILLION = 1_000_000
# Seconds between two lines of the log about a collector that does not take spans.
_TELL_AGAIN = 60.0
# Codes of gRPC that are errors of a server (OpenTelemetry's semantic conventions for gRPC). The others are a caller's.
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
# The attributes for what the log says of a call.
_ABOUT = {
    "sandbox": "criserver.sandbox.id",
    "container": "container.id",
    "name": "k8s.container.name",
    "reference": "container.image.name",
}


class TraceExport:
    """From its creation to :meth:`stop`, sends the calls to the collector at ``endpoint``, HOST:PORT.

    It is a :class:`~criserver.telemetry.spans.CallExporter`. A call whose caller has a trace is sampled as the caller
    says. ``rate`` is how many of a million other calls are sampled.
    """

    def __init__(self, endpoint: str, rate: int) -> None:
        self.configure(rate)
        self._ids = _TraceIds()
        self._sdk_failures = _SdkFailures(endpoint)
        logging.getLogger("opentelemetry").addHandler(self._sdk_failures)
        resource = Resource.create({"service.name": "criserver", "service.version": __version__})
        # The SDK gets only calls that are sampled.
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        exporter = OTLPSpanExporter(endpoint=f"http://{endpoint}", insecure=True)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("criserver", __version__)
        self._propagator = TraceContextTextMapPropagator()
        spans.export_to(self)

    def configure(self, rate: int) -> None:
        """Take over another rate, for the calls that begin from now on."""
        self._sampler = ParentBased(TraceIdRatioBased(rate / _MILLION))

    def sample(self, metadata: Mapping[str, str]) -> Sample | None:
        """See CallExporter. The trace of a call without a caller's trace gets its ID here."""
        above = self._propagator.extract(metadata)
        caller = get_current_span(above).get_span_context()
        trace_id = caller.trace_id if caller.is_valid else self._ids.new()
        if self._sampler.should_sample(above, trace_id, "").decision is not Decision.RECORD_AND_SAMPLE:
            return None
        return Sample(format_trace_id(trace_id), above)

    async def stop(self, seconds: float) -> None:
        """Send what is left, for at most so many seconds."""
        spans.export_to(None)
        try:
            async with asyncio.timeout(seconds):
                await in_loose_thread(self._provider.shutdown, "tracing-stop")
        except TimeoutError:
            log.warning("the last traces are lost: the collector did not take them in time")
        logging.getLogger("opentelemetry").removeHandler(self._sdk_failures)

    def send(self, trace: Trace) -> None:
        """See CallExporter."""
        assert trace.sample is not None
        above = trace.sample.above
        assert isinstance(above, Context)
        self._ids.given = int(trace.sample.trace_id, 16)
        name = f"{trace.service}/{trace.method}"
        call = self._tracer.start_span(
            name, above, SpanKind.SERVER, attributes=_call_attributes(trace, name), start_time=trace.at
        )
        places = [set_span_in_context(call, above)]
        for part in trace.spans:
            places.append(self._send_part(trace, part, places[part.parent + 1]))
        if trace.code in _FAULTS:
            call.set_status(Status(StatusCode.ERROR, trace.error))
        call.end(trace.at + _nanoseconds(trace.seconds))

    def _send_part(self, trace: Trace, part: Span, above: Context) -> Context:
        operation = part.operation
        labels = dict(zip(operation.labels, part.values, strict=True))
        words = [operation.name, *(value for label, value in labels.items() if label not in operation.of_one)]
        began = trace.at + _nanoseconds(part.began)
        attributes = {f"criserver.{label}": value for label, value in labels.items()}
        found = self._tracer.start_span(" ".join(words), above, attributes=attributes, start_time=began)
        if part.error:
            found.set_status(Status(StatusCode.ERROR, part.error))
        found.end(began + _nanoseconds(part.seconds))
        return set_span_in_context(found, above)


class _TraceIds(RandomIdGenerator):
    """The ID of a trace that the daemon begins is known when the call begins, and the SDK asks for it at the end."""

    given = 0

    def new(self) -> int:
        """A random one."""
        return super().generate_trace_id()

    def generate_trace_id(self) -> int:
        return self.given


class _SdkFailures(logging.Handler):
    """Puts what the SDK says of its failures into the daemon's log, once a minute: a collector may be down for days."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._endpoint = endpoint
        self._last = -_TELL_AGAIN

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._last >= _TELL_AGAIN:
            self._last = time.monotonic()
            log.warning("traces do not reach the collector", endpoint=self._endpoint, error=record.getMessage())


def _call_attributes(trace: Trace, name: str) -> Mapping[str, str]:
    found = {"rpc.system.name": "grpc", "rpc.method": name, "rpc.response.status_code": trace.code}
    if isinstance(pod := trace.about.get("pod"), str):
        found["k8s.namespace.name"], _, found["k8s.pod.name"] = pod.partition("/")
    found |= {attribute: str(trace.about[key]) for key, attribute in _ABOUT.items() if key in trace.about}
    return found


def _nanoseconds(seconds: float | None) -> int:
    return int((seconds or 0.0) * 1e9)
