"""The wheel is installed into an environment of its own, as by pip or pipx, and serves pods."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fixtures import import_image
from tests.support.node import Node

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with the wheel, built from a clean tree; its libraries are this one's."""
    base = tmp_path_factory.mktemp("wheel")
    tree = base / "tree"
    for name in ("criserver", "shims", "snapshotter", "proto"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "pb"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(base), str(tree)]
    subprocess.run([*pip, *command], check=True)
    (wheel,) = base.glob("criserver-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")], check=True)
    python = str(base / "venv/bin/python")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", str(wheel)], check=True)
    # A directory in a .pth file is searched, and .pth files in it are not: criserver itself is not found there.
    (site,) = base.glob("venv/lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(tree)
    return python


@pytest.fixture
def installed(nothing_left: None, python: str, busybox_archive: str) -> Iterator[Node]:
    node = Node()
    node.python = python
    try:
        node.start()
        import_image(node, busybox_archive)
        yield node
    finally:
        node.close()


def test_the_command_is_there_and_comes_from_the_wheel(python: str) -> None:
    command = os.path.join(os.path.dirname(python), "criserver")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.startswith("criserver ")
    code = "import criserver.pb.runtime.v1.api_pb2 as m, shims, snapshotter; print(m.__file__, shims.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert all(path.startswith(os.path.dirname(os.path.dirname(python))) for path in done.stdout.split())


def test_a_pod_runs_with_all_that_the_daemon_starts_from_it(installed: Node) -> None:
    node = installed
    pod = node.run_pod("wheel")
    container = node.run(pod, "c", ["sh", "-c", "echo from the wheel; exec sleep 1000"])
    assert node.sh(container, "echo hi") == "hi\n"
    assert node.log(container) == "from the wheel\n"
    node.kill()
    node.start()
    assert node.sh(container, "echo hi") == "hi\n"
