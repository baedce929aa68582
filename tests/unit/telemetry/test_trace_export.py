"""What a collector gets of a call, by the SDK's exporter in memory."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest
import structlog

from criserver.telemetry import otel_libraries, spans
from criserver.telemetry.operations import CNI, DOWNLOAD
from criserver.telemetry.spans import within

if not otel_libraries.are_installed():
    pytest.skip("OpenTelemetry is not installed: pip install 'criserver[tracing]'", allow_module_level=True)

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from criserver.telemetry.trace_export import TraceExport

TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7


@pytest.fixture
def sent() -> InMemorySpanExporter:
    """What is sent."""
    return InMemorySpanExporter()


@pytest.fixture(autouse=True)
def export(sent: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceExport]:
    """Of all calls, without a collector."""
    monkeypatch.setattr("criserver.telemetry.trace_export.BatchSpanProcessor", lambda _: SimpleSpanProcessor(sent))
    export = TraceExport("127.0.0.1:1", 1_000_000)
    yield export
    asyncio.run(export.stop(10))
    assert not spans.is_exporting()


def call(metadata: dict[str, str] | None = None, code: str = "OK", error: str = "") -> str:
    """The ID of the call's trace, as it was when the call began; "" for a call that is not sent."""
    about = {"pod": "shop/web-1", "name": "main", "container": "c" * 64, "sandbox": "5" * 64, "other": "x"}
    trace = spans.traced("runtime.v1.RuntimeService", "StartContainer", 7, about, metadata or {})
    assert trace is not None  # as all calls that start containers are kept
    with within(trace):
        with CNI.timed("bridge", "ADD") as timed:
            timed.fail("no address")
        with DOWNLOAD.timed("sha256:1"):
            pass
    trace.answered(code, error)
    return "" if trace.sample is None else trace.sample.trace_id


def test_a_call_is_a_servers_span_with_its_parts_below_it(sent: InMemorySpanExporter) -> None:
    call(code="UNAVAILABLE", error="try later")
    cni, download, server = sent.get_finished_spans()
    assert (cni.name, download.name, server.name) == (
        "CNI bridge ADD",
        "download",  # the digest would make a name of its own for each layer
        "runtime.v1.RuntimeService/StartContainer",
    )
    assert server.kind is SpanKind.SERVER
    assert server.parent is None
    assert cni.parent is not None and cni.parent.span_id == server.context.span_id
    assert (cni.status.status_code, cni.status.description) == (StatusCode.ERROR, "no address")
    assert (server.status.status_code, server.status.description) == (StatusCode.ERROR, "try later")
    assert dict(download.attributes or {}) == {"criserver.blob": "sha256:1"}
    assert dict(server.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": "runtime.v1.RuntimeService/StartContainer",
        "rpc.response.status_code": "UNAVAILABLE",
        "k8s.namespace.name": "shop",
        "k8s.pod.name": "web-1",
        "k8s.container.name": "main",
        "container.id": "c" * 64,
        "criserver.sandbox.id": "5" * 64,
    }
    assert server.start_time is not None and cni.start_time is not None
    assert cni.end_time is not None and server.end_time is not None
    assert server.start_time <= cni.start_time <= cni.end_time <= server.end_time


def test_a_code_that_is_the_callers_fault_is_no_error_of_the_daemon(sent: InMemorySpanExporter) -> None:
    call(code="NOT_FOUND", error="there is no such container")
    assert sent.get_finished_spans()[-1].status.status_code is StatusCode.UNSET


def test_a_caller_decides_for_its_own_calls(sent: InMemorySpanExporter) -> None:
    assert call({"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-00"}) == ""
    assert sent.get_finished_spans() == ()
    begun = call({"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "tracestate": "a=b"})
    assert begun == f"{TRACE:032x}"
    server = sent.get_finished_spans()[-1]
    assert server.parent is not None
    assert (server.context.trace_id, server.parent.span_id) == (TRACE, PARENT)
    assert dict(server.context.trace_state) == {"a": "b"}
    sent.clear()
    call({"traceparent": "nonsense"})
    assert sent.get_finished_spans()[-1].parent is None


def test_a_trace_that_begins_here_has_one_id_from_the_calls_begin_on(sent: InMemorySpanExporter) -> None:
    first, second = call(), call()
    assert first != second
    assert [f"{span.context.trace_id:032x}" for span in sent.get_finished_spans()] == [first] * 3 + [second] * 3


def test_the_rate_can_change(export: TraceExport, sent: InMemorySpanExporter) -> None:
    export.configure(0)
    call()
    assert sent.get_finished_spans() == ()
    export.configure(1_000_000)
    call()
    assert len(sent.get_finished_spans()) == 3


def test_failures_of_the_sdk_go_to_the_log_once_a_minute() -> None:
    with structlog.testing.capture_logs() as lines:
        for number in range(3):
            logging.getLogger("opentelemetry.exporter").error("failed %d", number)
    assert [(line["event"], line["error"]) for line in lines] == [("traces do not reach the collector", "failed 0")]


def test_a_stop_waits_for_the_last_spans_only_so_long(export: TraceExport, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(export._provider, "shutdown", go.wait)
    with structlog.testing.capture_logs() as lines:
        asyncio.run(export.stop(0.01))
    go.set()
    assert "the last traces are lost" in lines[-1]["event"]
