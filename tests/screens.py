"""Draws the screens of commands that docs/commands.md and docs/tracing.md show: ``python -m tests.screens``.

Each is printed by the real command, at a terminal, on a node of its own with a few pods. Run it as root. It writes
docs/screens/NAME.svg.
"""

from __future__ import annotations

import html
import os
import re
import sys
import time
from pathlib import Path

from tests.support.fixtures import import_image
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import Node
from tests.support.terminal import Terminal

SCREENS = {
    "status": ["status"],
    "trace": ["trace", "shop/web-1"],
    "du": ["du"],
    "top": ["top", "--once"],
}
COLUMNS = 110
IMAGE = "registry.example/shop/web:1"
# Pixels of a character and of a line, and around all of them.
_WIDTH, _HEIGHT, _MARGIN = 8.43, 19, 14
_COLOURS = {"": "#d4d4d4", "31": "#f26d6d", "32": "#6cc66c", "33": "#e0b34c"}
_PIECE = re.compile(r"\x1b\[(\d*)m([^\x1b]*)|([^\x1b]+)")
_BUSY = ["sh", "-c", "while :; do :; done & dd if=/dev/zero of=/written bs=1M count=24 2>/dev/null; exec sleep 1000"]


def main() -> None:
    """Draw all screens, or those that are named on the command line."""
    target = Path(__file__).parents[1] / "docs/screens"
    target.mkdir(exist_ok=True)
    node = Node()
    try:
        node.start()
        _fill(node)
        for name in sys.argv[1:] or SCREENS:
            command = [sys.executable, "-m", "criserver", *SCREENS[name], "--config", node.config]
            printed = _printed(command).replace(node.base, "/var/lib")
            (target / f"{name}.svg").write_text(drawn(f"criserver {' '.join(SCREENS[name])}", printed))
    finally:
        node.close()


def _fill(node: Node) -> None:
    """Pods of a shop: one is busy, and one has ended."""
    archive = f"{node.base}/busybox.tar"
    write_archive(busybox_image(), archive, IMAGE)
    import_image(node, archive)
    for name, command in (("web-1", _BUSY), ("web-2", ["sleep", "1000"]), ("db-0", ["sleep", "1000"])):
        config = node.pod(name)
        config.metadata.namespace = "shop"
        pod = node.client.RunPodSandbox(config=config).pod_sandbox_id
        node.pods.add(pod)
        node.run(pod, "main", command, image=IMAGE)
    time.sleep(3)  # the disk meter and the statistics have looked at all of it


def _printed(command: list[str]) -> str:
    with Terminal(command, {**os.environ, "TERM": "xterm"}, columns=COLUMNS, rows=60) as terminal:
        deadline = time.monotonic() + 30
        while terminal.read(deadline):
            pass
        return terminal.seen.decode().replace("\r", "")


def drawn(title: str, printed: str) -> str:
    """What a command has printed, as SVG."""
    lines = printed.rstrip().split("\n")
    width, height = COLUMNS * _WIDTH + 2 * _MARGIN, (len(lines) + 1) * _HEIGHT + 2 * _MARGIN
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#1e1e1e"/>',
        '<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">',
    ]
    for number, line in enumerate([f"# {title}", *lines]):
        y = _MARGIN + (number + 0.75) * _HEIGHT
        found.append(f'<text x="{_MARGIN}" y="{y:.1f}">{_spans(line)}</text>')
    return "\n".join([*found, "</g>", "</svg>", ""])


def _spans(line: str) -> str:
    spans, column = [], 0
    for code, coloured, plain in _PIECE.findall(line):
        text = coloured or plain
        if text.strip():
            weight = ' font-weight="bold"' if code == "1" else ""
            x = _MARGIN + (column + len(text) - len(text.lstrip())) * _WIDTH
            fill = _COLOURS.get(code, _COLOURS[""])
            spans.append(f'<tspan x="{x:.1f}" fill="{fill}"{weight}>{html.escape(text.strip())}</tspan>')
        column += len(text)
    return "".join(spans)


if __name__ == "__main__":
    main()
