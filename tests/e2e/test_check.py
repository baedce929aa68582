"""``criserver check`` on this machine: it finds that pods can run, and it finds what is taken away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criserver.check import advisories, tries
from criserver.config import RuntimeHandler, load
from tests.support.frozen_disk import UNTYPED, mount_disk
from tests.support.node import Node
from tests.support.waiting import SLOWNESS, eventually


def check(node: Node, *words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "criserver", "check", "--json", "--config", node.config, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def words(report: dict[str, Any], level: str) -> list[str]:
    return [f["found"] for f in report["findings"] if f["level"] == level]


def links() -> set[str]:
    """The network interfaces, without those that another run of the tests makes meanwhile: bridges and pods' ends."""
    return {name for name in os.listdir("/sys/class/net") if not re.fullmatch(r"crie2e\d+|veth[0-9a-f]{8}", name)}


def test_pods_can_run_here_beside_a_daemon_and_without(node: Node) -> None:
    def seen() -> tuple[set[str], list[str], list[str]]:
        return links(), sorted(os.listdir(node.root)), sorted(os.listdir(node.state))

    eventually(lambda: os.path.exists(f"{node.root}/synced.json"))  # a daemon makes it a moment after its start
    before = seen()
    code, report = check(node)
    assert (code, report["pods_can_run"]) == (0, True), words(report, "missing")
    assert node.process is not None
    assert f"criserver serves at {node.socket} (PID {node.process.pid})" in words(report, "ok")
    assert "a container was run by runc" in words(report, "ok")
    eventually(lambda: seen() == before, told=lambda: f"{seen()} is not {before}")
    node.kill()
    code, report = check(node)
    assert code == 0, words(report, "missing")
    assert f"the socket at {node.socket} belongs to a daemon that has ended" in words(report, "ok")


def test_versions_are_told_as_programs_tell_them(tmp_path: Path) -> None:
    known = advisories.parse(tries.version("runc") or "")
    assert known is not None
    assert known[0] == "runc"
    portmap = next(path for d in load(None).cni_bin_dirs if os.path.exists(path := f"{d}/portmap"))
    assert (tries.plugin_version(portmap) or "").startswith("CNI portmap plugin v")
    assert tries.plugin_version(str(tmp_path / "none")) is None
    assert tries.plugin_version("/bin/false") is None


def test_a_node_without_a_network_is_told_so(node: Node) -> None:
    os.rename(f"{node.cni}/10-e2e.conflist", f"{node.base}/kept")
    try:
        code, report = check(node)
    finally:
        os.rename(f"{node.base}/kept", f"{node.cni}/10-e2e.conflist")
    assert (code, report["pods_can_run"]) == (1, False)
    (lacking,) = words(report, "missing")
    assert lacking.startswith(f"no CNI configuration in {node.cni}")


def test_for_people_it_prints_lines_with_what_to_do(node: Node) -> None:
    with open(f"{node.base}/other.toml", "w") as f, open(node.config) as g:
        text = re.sub('infra = ".*"', 'infra = "/nowhere/catatonit"', g.read())
        f.write(re.sub('conf_dir = ".*"', 'conf_dir = "/nowhere/net.d"', text, count=1))
    command = [sys.executable, "-m", "criserver", "check", "--config", f"{node.base}/other.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWNESS)
    assert done.returncode == 1
    assert "warning  runtimes      /nowhere/catatonit is not an executable" in done.stdout
    assert "-> install catatonit" in done.stdout
    assert "missing  network       no CNI configuration in /nowhere/net.d" in done.stdout
    assert done.stdout.endswith("missing\n")


def test_a_file_system_that_cannot_hold_images_is_found_by_trying(nothing_left: None, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    # The kernel takes no overlay for the upper layer of another.
    with tmpfs(tmp_path / "lower", "ro"):
        assert tries.overlay(str(tmp_path / "lower")) == "it is not writable (Read-only file system)"
    with tmpfs(tmp_path / "upper", "rw"):
        assert tries.overlay(str(tmp_path / "upper")) is None
        os.mkdir(tmp_path / "upper/upper")
        os.mkdir(tmp_path / "upper/work")
        options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper/upper,workdir={tmp_path}/upper/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "check", str(tmp_path / "merged")], check=True)
        try:
            found = tries.overlay(str(tmp_path / "merged"))
            assert os.listdir(tmp_path / "merged") == []
        finally:
            subprocess.run(["umount", str(tmp_path / "merged")], check=True)
    assert found is not None
    assert "overlay cannot be mounted" in found


def test_a_file_system_without_types_in_lists_is_found_by_trying(nothing_left: None, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    mount_disk(tmp_path / "disk", point, 16 << 20, *UNTYPED)
    try:
        found = tries.overlay(str(point))
    finally:
        subprocess.run(["umount", point], check=True)
    assert found is not None
    assert "deleted files of images stay in lists" in found


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "check", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_links_are_made_where_nobody_sees_them() -> None:
    before = links()
    assert tries.link("bridge") is None
    assert tries.link("veth") is None
    assert tries.link("nosuchkind") == os.strerror(95)
    assert links() == before


def test_a_container_that_the_runtime_refuses_is_told_in_its_words(node: Node, tmp_path: Path) -> None:
    refusing = tmp_path / "refusing"
    refusing.write_text("#!/bin/sh\necho 'no containers on Tuesdays' >&2\nexit 1\n")
    refusing.chmod(0o755)
    config = dataclasses.replace(load(node.config), runtimes={"runc": RuntimeHandler("runc", str(refusing))})
    assert tries.container(config, "runc") == "no containers on Tuesdays"
    assert [name for name in os.listdir(node.state) if name.startswith("check-")] == []
