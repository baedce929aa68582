"""What ``criserver check`` says of tracing."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from criserver.check import ExaminedNode, Finding, tracing
from criserver.config import Config, load
from criserver.telemetry import otel_libraries


def found(endpoint: str) -> list[Finding]:
    config: Config = dataclasses.replace(load(None), tracing_endpoint=endpoint)
    return list(tracing.check(ExaminedNode(), config))


def test_nothing_is_said_where_tracing_is_off() -> None:
    assert found("") == []


def test_missing_libraries_keep_the_daemon_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel_libraries, "_MODULES", ("opentelemetry.no_such_module",))
    (finding,) = found("127.0.0.1:4317")
    assert finding.level.value == "missing"
    assert "criserver[tracing]" in finding.advice
    monkeypatch.setattr(otel_libraries, "_MODULES", ("no_such_package.module",))
    assert not otel_libraries.are_installed()


def test_a_collector_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel_libraries, "_MODULES", ("json",))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert [f.level.value for f in found(address)] == ["ok"]
    with socket.socket() as silent:  # nobody else takes the port, which does not answer
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert [f.level.value for f in found(address)] == ["warning"]
