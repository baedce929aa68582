"""The lock files: one version of each library, with hashes, and no registry by name."""

from __future__ import annotations

import re

from tests.support.pages import ROOT


def locked(name: str) -> dict[str, str]:
    """The version of each library in a lock file."""
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    blocks = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) ", text, re.MULTILINE))


def test_each_lock_has_what_the_smaller_one_has() -> None:
    daemon, tracing, dev = (locked(f"requirements{more}.lock") for more in ("", "-tracing", "-dev"))
    assert daemon.items() < tracing.items() < dev.items()
    added = tracing.keys() - daemon.keys()
    assert {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc"} <= added
    assert all(name.startswith("opentelemetry-") or name == "googleapis-common-protos" for name in added)
