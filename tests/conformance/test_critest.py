"""critest, the conformance suite of cri-tools, against a daemon of its own.

Its images are pulled by their official names. CRITEST_CERTS names a certs.d directory (as [registry] config_path
has it) whose hosts.toml files lead registry.k8s.io, k8s.gcr.io and gcr.io to a registry that has them, so that
the run does not hang on the network. CRITEST_RUNTIME is an OCI runtime's path, or a shim's name or path; runc where it
is not set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import Node, handler
from tests.support.waiting import SLOWNESS

RUNTIME = os.environ.get("CRITEST_RUNTIME", "runc")
CERTS = os.environ.get("CRITEST_CERTS", "")
REGISTRIES = ("registry.k8s.io", "k8s.gcr.io", "gcr.io")
# Benchmarks are not conformance.
SKIP = "benchmark"
WEBSOCKET = ["--websocket-exec", "--websocket-attach", "--websocket-portforward", "--ginkgo.focus=Streaming"]

pytestmark = [
    pytest.mark.skipif(shutil.which("critest") is None, reason="critest is not on PATH"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real mounts, namespaces and containers"),
    pytest.mark.skipif(
        not all(os.path.exists(os.path.join(CERTS, name, "hosts.toml")) for name in REGISTRIES),
        reason=f"CRITEST_CERTS names no directory with a hosts.toml for each of {', '.join(REGISTRIES)}",
    ),
]


@pytest.fixture(scope="module")
def node(nothing_left: None) -> Iterator[Node]:
    """A daemon with the runtime to be tested, and no image."""
    node = Node(handler("runc", RUNTIME))
    try:
        node.start()
        yield node
    finally:
        node.close()


@pytest.mark.timeout(1000 * SLOWNESS)
@pytest.mark.parametrize("more", [[], WEBSOCKET], ids=["all", "streaming over WebSocket"])
def test_no_spec_fails(node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    for name in os.listdir(CERTS):
        if os.path.isdir(os.path.join(CERTS, name)):
            link = os.path.join(node.certs, name)
            if not os.path.lexists(link):
                os.symlink(os.path.abspath(os.path.join(CERTS, name)), link)
    endpoint = f"unix://{node.socket}"
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *("critest", "--runtime-endpoint", endpoint, "--image-endpoint", endpoint),
            *("-nri-socket", f"{node.base}/nri/nri.sock"),
            *("--ginkgo.no-color", "--ginkgo.skip", SKIP, f"--ginkgo.json-report={report}", *more),
        ],
        capture_output=True,
        text=True,
        timeout=900 * SLOWNESS,
        cwd=tmp_path,
        check=False,
    )
    assert report.exists(), f"critest did not come to an end:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    specs = [s for suite in json.loads(report.read_text()) for s in suite["SpecReports"] if s["LeafNodeType"] == "It"]
    by_state: dict[str, list[dict[str, Any]]] = {}
    for spec in specs:
        by_state.setdefault(spec["State"], []).append(spec)
    # A spec that the expression above leaves out is skipped too, but without a word.
    skipped = {title(s): s["Failure"]["Message"] for s in by_state.pop("skipped", []) if s.get("Failure")}
    with capsys.disabled():
        print(f"\ncritest: {len(by_state.get('passed', []))} passed, {len(skipped)} skipped")
        for name, reason in sorted(skipped.items()):
            print(f"  skipped: {name}: {reason}")
    assert by_state.pop("passed", []), "nothing was tested"
    failed = [f"{title(s)}: {s['Failure']['Message']}" for found in by_state.values() for s in found]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stdout[-4000:]


def title(spec: dict[str, Any]) -> str:
    """A spec as Ginkgo writes it."""
    return " ".join((*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]))
