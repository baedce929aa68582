"""Whether the libraries of OpenTelemetry are installed: an extra, which most nodes do not need."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.grpc")

ADVICE = (
    "install them by `pip install 'criserver[tracing]'` in the daemon's environment, or set tracing.endpoint to \"\""
)


def are_installed() -> bool:
    """Whether tracing can be turned on. It imports no more than the packages that the modules are in."""
    try:
        return all(find_spec(module) is not None for module in _MODULES)
    except ModuleNotFoundError:
        return False
