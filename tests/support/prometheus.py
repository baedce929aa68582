"""A Prometheus of its own, that scrapes a node's metrics each second."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

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


@contextmanager
def scraping(address: str, directory: Path, rules: Sequence[str] = ()) -> Iterator[Prometheus]:
    """A Prometheus that scrapes ``address`` as the job criserver. Its files are in ``directory``."""
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": list(rules),
        "scrape_configs": [{"job_name": "criserver", "static_configs": [{"targets": [address]}]}],
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
