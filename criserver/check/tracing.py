"""Tracing: the libraries that it needs, and the collector."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config
from criserver.telemetry import otel_libraries

_TIMEOUT = 2.0


def check(_host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """Nothing where tracing is off."""
    endpoint = config.tracing_endpoint
    if not endpoint:
        return
    if not otel_libraries.are_installed():
        yield missing(
            f"tracing.endpoint = {endpoint!r} needs OpenTelemetry's libraries, which are not installed: the daemon "
            "does not start",
            otel_libraries.ADVICE,
        )
        return
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT).close()
    except (OSError, OverflowError) as e:
        yield warning(
            f"tracing: no collector answers at {endpoint} ({e}); traces are lost, and pods are not affected",
            "start the collector, or set tracing.endpoint",
        )
        return
    yield ok(f"tracing: a collector listens at {endpoint}")
