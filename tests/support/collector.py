"""A collector of traces for tests: it takes OTLP over gRPC, and keeps the spans. It can also take them and hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Collector:
    """Serves from its creation to :meth:`close`. ``hold`` is cleared while exports get no answer."""

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.hold.set()
        self.asked = threading.Event()
        self._spans: list[Any] = []
        self._services: dict[bytes, str] = {}
        export: Any = grpc.unary_unary_rpc_method_handler(
            self._export, ExportTraceServiceRequest.FromString, lambda message: message.SerializeToString()
        )
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Export": export}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: ExportTraceServiceRequest, _: grpc.ServicerContext) -> ExportTraceServiceResponse:
        self.asked.set()
        self.hold.wait()
        for resource_spans in request.resource_spans:
            service = attributes(resource_spans.resource)["service.name"]
            for scope_spans in resource_spans.scope_spans:
                self._services |= {span.span_id: service for span in scope_spans.spans}
                self._spans += scope_spans.spans
        return ExportTraceServiceResponse()

    def all(self) -> list[Any]:
        """All spans that have come so far."""
        return list(self._spans)

    def of(self, trace_id: str) -> list[Any]:
        """The spans of a trace that have come so far."""
        return [span for span in self.all() if span.trace_id.hex() == trace_id]

    def service(self, span: Any) -> str:
        """The service that has sent a span."""
        return self._services[span.span_id]

    def close(self) -> None:
        """Stop serving."""
        self.hold.set()
        self._server.stop(None)


def attributes(of: Any) -> dict[str, str]:
    """The attributes of a span or of a service that are texts."""
    return {attribute.key: attribute.value.string_value for attribute in of.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector. Programs that are started in the block send their spans at once, and not every five seconds."""
    collector = Collector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
        try:
            yield collector
        finally:
            collector.close()
