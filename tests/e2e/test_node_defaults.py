"""What an operator sets for all pods of a node, with one configuration that has all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.fixtures import serving
from tests.support.node import RUNTIME, Node, handler
from tests.support.waiting import eventually

SLEEP = ["sleep", "1000"]


@pytest.fixture(scope="module")
def node(nothing_left: None, busybox_archive: str) -> Iterator[Node]:
    with serving(
        busybox_archive,
        '[images]\npinned = ["localhost/busy*"]\n' + handler("runc", RUNTIME),
    ) as node:
        yield node


def test_an_image_is_pinned_while_a_pattern_matches_its_name(node: Node) -> None:
    def pinned() -> bool:
        (image,) = node.client.ListImages().images
        found: bool = node.client.ImageStatus(image={"image": "localhost/busybox"}).image.pinned
        assert found == image.pinned
        return found

    assert pinned()
    drop_in = Path(node.config).parent / "conf.d" / "pinned.toml"
    drop_in.parent.mkdir(exist_ok=True)
    for patterns, wanted in (("[]", False), ('["*/busybox:latest"]', True)):
        drop_in.write_text(f"[images]\npinned = {patterns}\n")
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGHUP)
        eventually(partial(lambda expected: pinned() is expected, wanted))
    command = [sys.executable, "-m", "criserver", "image"]
    subprocess.run([*command, "prune", "--all", "--config", node.config], check=True, capture_output=True)
    assert pinned()
    name = "localhost/busybox:latest"
    result = subprocess.run(
        [*command, "unpin", "--config", node.config, name], check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"a pattern of images.pinned matches {name}" in result.stderr
