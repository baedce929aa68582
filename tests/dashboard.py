"""Draws contrib/grafana's dashboard for docs/metrics.md: ``python -m tests.dashboard [MINUTES]``.

A Prometheus on PATH scrapes a node of its own, on which pods live and die and images are pulled. Then it is asked for
the query of each panel. Grafana is not needed, and the picture says so. Run it as root. It writes
docs/screens/dashboard.svg.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.imagebuilder import build_image, busybox_image, write_archive
from tests.support.node import Node
from tests.support.prometheus import Prometheus, scraping
from tests.support.registry import Registry, free_port

ROOT = Path(__file__).parents[1]
WORKERS = 3
# Seconds: between two points of a line, and of the rates.
STEP, RATE = 2, 15
# Pixels of a column and a line of Grafana's grid of 24 columns, and of what is around a plot.
_COLUMN, _LINE, _LEFT, _TOP, _RIGHT = 50, 22, 52, 26, 8
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#c0d8ff")
_SHOWN = len(_COLOURS)


class Line(NamedTuple):
    """A series: its legend and its points, by Unix seconds."""

    legend: str
    points: Sequence[tuple[float, float]]


def main() -> None:
    """Run the node for some minutes and draw."""
    minutes = float(sys.argv[1]) if sys.argv[1:] else 3
    board = json.loads((ROOT / "contrib/grafana/criserver.json").read_text())
    address, node = f"127.0.0.1:{free_port()}", Node()
    try:
        with open(node.config, "a") as f:
            f.write(f'[metrics]\naddress = "{address}"\n')
        node.start()
        archive = f"{node.base}/busybox.tar"
        write_archive(busybox_image(), archive, "localhost/busybox:latest")
        import_image(node, archive)
        with tempfile.TemporaryDirectory() as directory, scraping(address, Path(directory)) as prometheus:
            began = time.time()
            with _working(node):
                time.sleep(60 * minutes)
            picture = drawn(board, prometheus, began, time.time())
        (ROOT / "docs/screens/dashboard.svg").write_text(picture)
    finally:
        node.close()


@contextlib.contextmanager
def _working(node: Node) -> Iterator[None]:
    """Workers make and remove pods, and one pulls an image again and again. A plugin fails at times."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as directory:
        registry = Registry(directory)
        name = registry.push(build_image([{"a": os.urandom(20 << 20)}, {"b": os.urandom(4 << 20)}]), "shop/web:1")
        jobs = [threading.Thread(target=_pods, args=(node, number, ended)) for number in range(WORKERS)]
        jobs.append(threading.Thread(target=_pulls, args=(node, name, ended)))
        try:
            for job in jobs:
                job.start()
            yield
        finally:
            ended.set()
            for job in jobs:
                job.join()
            registry.close()


def _pods(node: Node, number: int, ended: threading.Event) -> None:
    turn = 0
    while not ended.is_set():
        turn += 1
        name = f"web-{number}-{turn}"
        pod = node.run_pod(name)
        container = node.run(pod, "main", ["sleep", "1000"])
        for _ in range(4):
            node.sh(container, "head -c 1000000 /dev/zero | wc -c")
            ended.wait(0.5)
        with contextlib.suppress(grpc.RpcError):  # a name that is taken: one of the panels is for errors
            node.run_pod(name)
        node.client.StopPodSandbox(pod_sandbox_id=pod)
        node.client.RemovePodSandbox(pod_sandbox_id=pod)


def _pulls(node: Node, name: str, ended: threading.Event) -> None:
    image = cri.ImageSpec(image=name)
    while not ended.wait(2):
        node.client.PullImage(image=image)
        node.client.RemoveImage(image=image)


def drawn(board: dict[str, Any], prometheus: Prometheus, began: float, now: float) -> str:
    """The panels with what Prometheus answers, as SVG."""
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"]) * _LINE + 2 * _LINE
    title = "The dashboard's panels, drawn from Prometheus' answers and not by Grafana"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * _COLUMN} {height}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#d8d9da">',
        f"<title>{title}</title>",
        f'<rect width="{24 * _COLUMN}" height="{height}" fill="#111217"/>',
        f'<text x="10" y="24" font-size="15">{board["title"]}</text>',
        f'<text x="110" y="24" fill="#8e8e8e">{title}</text>',
    ]
    for panel in board["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * _COLUMN, place["y"] * _LINE + 2 * _LINE
        width, tall = place["w"] * _COLUMN, place["h"] * _LINE
        parts.append(f'<g transform="translate({x + 4} {y})">')
        if panel["type"] == "row":
            parts.append(f'<text x="4" y="16" font-size="14">{html.escape(panel["title"])}</text>')
        else:
            parts.append(f'<rect width="{width - 8}" height="{tall - 8}" rx="3" fill="#181b1f"/>')
            parts.append(f'<text x="8" y="18">{html.escape(panel["title"])}</text>')
            parts += _content(panel, prometheus, (began, now), (width - 8, tall - 8))
        parts.append("</g>")
    return "\n".join((*parts, "</svg>\n"))


def _content(
    panel: dict[str, Any], prometheus: Prometheus, period: tuple[float, float], size: tuple[int, int]
) -> list[str]:
    queries = [(_query(target["expr"]), target.get("legendFormat", "")) for target in panel["targets"]]
    if panel["type"] == "stat":
        value = prometheus.value(queries[0][0]) or "no data"
        return [f'<text x="{size[0] / 2}" y="{size[1] / 2 + 24}" font-size="48" text-anchor="middle">{value}</text>']
    if panel["type"] == "table":
        found = prometheus.asked("query", query=queries[0][0])["result"]
        rows = ["  ".join([*series["metric"].values(), series["value"][1]]) for series in found]
        return [f'<text x="16" y="{44 + 18 * n}">{html.escape(row)}</text>' for n, row in enumerate(rows)]
    began, now = period
    lines = []
    for query, legend in queries:
        answer = prometheus.asked("query_range", query=query, start=str(began), end=str(now), step=str(STEP))
        for series in answer["result"]:
            points = [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]
            lines.append(Line(_legend(legend, series["metric"]), points))
    return _plotted(lines, panel["fieldConfig"]["defaults"].get("unit", "short"), period, size)


def _query(expression: str) -> str:
    return str(expression).replace("$__rate_interval", f"{RATE}s").replace("$instance", ".*")


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form.replace("127.0.0.1:", "node:")


def _plotted(lines: list[Line], unit: str, period: tuple[float, float], size: tuple[int, int]) -> list[str]:
    """Lines in a plot, the largest ones first, with a legend at the right."""
    began, now = period
    lines = sorted(lines, key=lambda line: -max((value for _, value in line.points), default=0))[:_SHOWN]
    most = max((value for line in lines for _, value in line.points), default=0) * 1.1 or 1
    right, bottom = size[0] * 0.62, size[1] - 22
    parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" stroke="#44474d" fill="none"/>']
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - _TOP)
        label = _with_unit(share * most, unit)
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.0f}" text-anchor="end" font-size="10">{label}</text>')
    parts.append(
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end" font-size="10">{(now - began) / 60:.0f} min</text>'
    )
    if not lines:
        parts.append(f'<text x="{(_LEFT + right) / 2}" y="{(bottom + _TOP) / 2}" text-anchor="middle">no data</text>')
    for number, line in enumerate(lines):
        across, up = (right - _LEFT) / (now - began), (bottom - _TOP) / most
        points = " ".join(f"{_LEFT + (at - began) * across:.1f},{bottom - value * up:.1f}" for at, value in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_COLOURS[number]}"/>')
        y = _TOP + 6 + number * 16
        parts.append(f'<path d="M{right + 10} {y - 4}h10" stroke="{_COLOURS[number]}" stroke-width="3"/>')
        parts.append(f'<text x="{right + 24}" y="{y}" font-size="11">{html.escape(line.legend)}</text>')
    return parts


def _with_unit(value: float, unit: str) -> str:
    if unit in ("bytes", "Bps"):
        return f"{value / (1 << 20):.3g} MiB" + ("/s" if unit == "Bps" else "")
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    return f"{value:.3g}" + ("/s" if unit in ("reqps", "ops") else "")


if __name__ == "__main__":
    main()
