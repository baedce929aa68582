"""A Prometheus of its own, that scrapes a node's metrics each second."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from tests.support.registry import free_port


class Prometheus:
    """Asks a running Prometheus by its HTTP API."""

    def __init__(self, address: str) -> None:
        self._address = address

    def asked(self, path: str, **parameters: str) -> Any:
        """What it answers; None while it does not serve yet."""
        url = f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}"
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> str | None:
        """The first value of an expression now; None without one."""
        found = self.asked("query", query=expression)
        return found["result"][0]["value"][1] if found and found["result"] else None

    def fires(self, alert: str, **labels: str) -> bool:
        """Whether an alert with these labels fires now."""
        wanted = {"alertname": alert, "alertstate": "firing", **labels}
        return (
            self.value(f"ALERTS{{{','.join(f'{name}={json.dumps(value)}' for name, value in wanted.items())}}}")
            is not None
        )


def in_seconds(rules: Path, directory: Path) -> str:
    """A copy of a file of rules in which each minute is a second; nothing else differs. Returns its path."""
    content = yaml.safe_load(rules.read_text())
    for rule in (rule for group in content["groups"] for rule in group["rules"]):
        rule["expr"] = re.sub(r"\[(\d+)m\]", r"[\1s]", rule["expr"])
        if "for" in rule:
            rule["for"] = re.sub(r"^(\d+)m$", r"\1s", rule["for"])
    copy = directory / rules.name
    copy.write_text(yaml.safe_dump(content))
    return str(copy)


@contextmanager
def scraping(addresses: str | Sequence[str], directory: Path, rules: Sequence[str] = ()) -> Iterator[Prometheus]:
    """A Prometheus that scrapes one or more addresses as the job criserver. Its files are in ``directory``."""
    targets = [addresses] if isinstance(addresses, str) else list(addresses)
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": list(rules),
        "scrape_configs": [{"job_name": "criserver", "static_configs": [{"targets": targets}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(configuration))
    own = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address={own}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield Prometheus(own)
    finally:
        process.terminate()
        process.wait(30)
