"""contrib/prometheus and contrib/grafana: they name families that there are, and a test fires each alert."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.telemetry.families import TABLE
from criserver.telemetry.instruments import Histogram
from tests.support.pages import ROOT
from tests.support.prometheus import in_seconds

PROMETHEUS = ROOT / "contrib/prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "criserver.rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "criserver.test.yml").read_text())["tests"]
BOARD: dict[str, Any] = json.loads((ROOT / "contrib/grafana/criserver.json").read_text())


def samples() -> dict[str, set[str]]:
    """The labels of all samples that the daemon serves, by the sample's name."""
    found = {}
    for family in TABLE:
        endings = ("_bucket", "_count", "_sum") if isinstance(family, Histogram) else ("",)
        found.update({family.name + ending: set(family.labels) for ending in endings})
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for test in TESTS:
        yield from (series["series"] for series in test["input_series"])


def test_every_family_that_is_named_is_served() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = set()
    for expression in expressions():
        used |= set(re.findall(r"(?<![\w:\"])criserver_\w+", expression))
        used |= set(re.findall(r"\b\w+:criserver_[\w:]+", expression))
    assert used - samples().keys() - recorded == set()
    assert len(used) > 30


def test_each_label_that_is_asked_for_is_one_of_its_family() -> None:
    own = {"job", "instance", "le"}
    labels = samples()
    for expression in expressions():
        for name, given in re.findall(r"(criserver_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=|!)", given)) <= labels[name] | own, expression


def test_each_alert_has_a_summary_and_a_test_that_fires_it_and_one_that_does_not() -> None:
    quiet, *loud = TESTS
    assert {check["alertname"] for check in quiet["alert_rule_test"]} == set(ALERTS)
    assert all(check["exp_alerts"] == [] for check in quiet["alert_rule_test"])
    fired = {check["alertname"] for test in loud for check in test["alert_rule_test"] if check["exp_alerts"]}
    assert fired == set(ALERTS)
    for name, alert in ALERTS.items():
        assert set(alert["annotations"]) == {"summary", "description"}, name
        assert alert["labels"]["severity"] in ("warning", "critical"), name


def test_each_alert_has_a_cause_that_is_made_end_to_end() -> None:
    made = re.findall(r'^@cause\("\w+", "(\w+)"\)$', (ROOT / "tests/e2e/test_alerts.py").read_text(), re.MULTILINE)
    assert sorted(made) == sorted(ALERTS)


def test_each_method_that_is_named_is_one_of_the_daemon() -> None:
    services = [file.services_by_name.values() for file in (cri.DESCRIPTOR, admin.DESCRIPTOR)]
    methods = {method.name for service in itertools.chain(*services) for method in service.methods}
    named = {
        name
        for text in expressions()
        for names in re.findall(r'method[=!]~?"([\w|]+)"', text)
        for name in names.split("|")
    }
    assert len(named) > 8
    assert named - methods == set()


def test_a_copy_of_the_rules_in_which_a_minute_is_a_second(tmp_path: Path) -> None:
    """Nothing else differs."""
    copy = Path(in_seconds(PROMETHEUS / "criserver.rules.yml", tmp_path))
    rules = [rule for group in yaml.safe_load(copy.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        assert not re.search(r"\[\d+[^s\d]", rule["expr"])
        assert rule.get("for", "0s").endswith("s")
        rule["expr"] = re.sub(r"\[(\d+)s\]", r"[\1m]", rule["expr"])
        rule |= {"for": rule["for"].replace("s", "m")} if "for" in rule else {}
    assert rules == RULES


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH (Debian's package prometheus)")
@pytest.mark.parametrize("words", [("check", "criserver.rules.yml"), ("test", "criserver.test.yml")])
def test_promtool_finds_no_fault(words: tuple[str, str]) -> None:
    command = ["promtool", words[0], "rules", words[1]]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap_and_each_has_a_query() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        grid = panel["gridPos"]
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & own, panel["title"]
        cells |= own
        assert panel["type"] == "row" or panel["targets"], panel["title"]
