"""Instruments: nothing until metrics are on, then values; labels with a limit."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from criserver.telemetry import families, operations
from criserver.telemetry.exposition import Exposition
from criserver.telemetry.instruments import Counter


@pytest.fixture
def exposition() -> Iterator[Exposition]:
    exposition = Exposition()
    yield exposition
    exposition.close()


async def value(exposition: Exposition, name: str, **labels: str) -> float | None:
    text = (await exposition.render()).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = [s.value for s in samples if s.name == name and s.labels == labels]
    assert len(found) < 2
    return found[0] if found else None


def test_nothing_is_counted_and_nothing_imported_while_metrics_are_off() -> None:
    code = (
        "import sys, criserver.daemon; from criserver.telemetry import families;"
        "families.PULLS.add(1, 'a', 'pulled'); families.RPC_DURATION.observe(1, 'a', 'b');"
        "assert families.PULLS._real is None;"
        "names = ('prometheus', 'opentelemetry', 'criserver.telemetry.');"
        "print([name for name in sys.modules if name.startswith(names)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ["families", "instruments", "operations", "otel_libraries", "spans"]
    assert sorted(ast.literal_eval(done.stdout)) == [f"criserver.telemetry.{name}" for name in modules]


async def test_a_counter_a_gauge_and_a_histogram(exposition: Exposition) -> None:
    families.PULLS.add(2, "example.org", "pulled")
    families.EXECS_RUNNING.add(3)
    families.EXECS_RUNNING.add(-1)
    families.RECOVERY_DURATION.set(1.5)
    families.CNI_DURATION.observe(0.02, "bridge", "ADD")
    assert await value(exposition, "criserver_image_pulls_total", registry="example.org", result="pulled") == 2
    assert await value(exposition, "criserver_execs_running") == 2
    assert await value(exposition, "criserver_recovery_duration_seconds") == 1.5
    bucket, labels = "criserver_cni_operation_duration_seconds_bucket", {"plugin": "bridge", "verb": "ADD"}
    assert await value(exposition, bucket, **labels, le="0.01") == 0
    assert await value(exposition, bucket, **labels, le="0.025") == 1


async def test_a_timer_observes_and_counts_a_failure(exposition: Exposition) -> None:
    labels = {"plugin": "bridge", "verb": "DEL"}
    with operations.CNI.timed("bridge", "DEL"):
        pass
    assert await value(exposition, "criserver_cni_operation_failures_total", **labels) is None
    with pytest.raises(KeyError), operations.CNI.timed("bridge", "DEL"):
        raise KeyError
    assert await value(exposition, "criserver_cni_operation_failures_total", **labels) == 1
    assert await value(exposition, "criserver_cni_operation_duration_seconds_count", **labels) == 2


async def test_a_bounded_label_has_only_so_many_values(exposition: Exposition) -> None:
    for number in range(25):
        families.PULLS.add(1, f"registry{number}", "failed")
    families.PULLS.add(1, "registry3", "failed")
    name = "criserver_image_pulls_total"
    assert await value(exposition, name, registry="registry3", result="failed") == 2
    assert await value(exposition, name, registry="registry19", result="failed") == 1
    assert await value(exposition, name, registry="registry20", result="failed") is None
    assert await value(exposition, name, registry="other", result="failed") == 5


async def test_a_reading_that_fails_is_left_out_and_the_others_are_there(
    exposition: Exposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[tuple[str, ...], float]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(families.IMAGES, "source", broken)
    monkeypatch.setattr(families.SANDBOXES, "source", lambda: {("ready",): 4, ("creating",): 0})
    assert await value(exposition, "criserver_images") is None
    assert await value(exposition, "criserver_sandboxes", state="ready") == 4
    assert await value(exposition, "criserver_sandboxes", state="creating") == 0


def test_the_wrong_number_of_labels_is_an_error() -> None:
    counter = Counter("x_total", "X.", "a", "b")
    counter.bind(SimpleNamespace(labels=print))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        counter.add(1, "only one")
