"""A collector of traces for tests: it takes OTLP over gRPC, and keeps the spans. It can also take them and hang."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
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
        self.resources: list[dict[str, str]] = []
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
            self.resources.append({a.key: a.value.string_value for a in resource_spans.resource.attributes})
            for scope_spans in resource_spans.scope_spans:
                self._spans += scope_spans.spans
        return ExportTraceServiceResponse()

    def all(self) -> list[Any]:
        """All spans that have come so far."""
        return list(self._spans)

    def of(self, trace_id: str) -> list[Any]:
        """The spans of a trace that have come so far."""
        return [span for span in self.all() if span.trace_id.hex() == trace_id]

    def close(self) -> None:
        """Stop serving."""
        self.hold.set()
        self._server.stop(None)


def attributes(span: Any) -> dict[str, str]:
    """The attributes of a span, which are all texts."""
    return {attribute.key: attribute.value.string_value for attribute in span.attributes}
