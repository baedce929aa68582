"""What `criserver check` says of settings that a node cannot give to pods."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from criserver.check import unmet_settings
from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Level
from criserver.config import load

V1 = "25 24 0:22 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
V2 = "22 21 0:20 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
HOOK = {"version": "1.0.0", "hook": {"path": "/usr/bin/hook"}, "when": {"always": True}, "stages": ["prestart"]}


class Examined:
    """A node in a directory, with a configuration file that the tests write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/mountinfo", V2)
        self.write("proc/sys/fs/nr_open", "1048576\n")
        self.write("proc/sys/net/ipv4/ip_forward", "1\n")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def found(self, configuration: str) -> list[tuple[Level, str]]:
        """The level and the words of each finding."""
        (self.root / "criserver.toml").write_text(configuration)
        host = ExaminedNode(root=str(self.root), which=lambda name: f"/usr/bin/{name}")
        return [(f.level, f.words) for f in unmet_settings.check(host, load(str(self.root / "criserver.toml")))]


@pytest.fixture
def node(tmp_path: Path) -> Examined:
    return Examined(tmp_path)


def test_nothing_is_wrong_by_default_and_with_sound_settings(node: Examined) -> None:
    assert [level for level, _ in node.found("")] == [Level.OK]
    node.write("etc/base.json", "{}")
    node.write("etc/shared", "")
    node.write("usr/bin/hook", "", 0o755)
    node.write("etc/hooks.d/a.json", json.dumps(HOOK))
    node.write("etc/net/10.conflist", json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "ptp"}]}))
    sound = """
        [runtime]
        default_sysctls = ["net.ipv4.ip_forward=1", "net.ipv4.conf.eth0.forwarding=1"]
        default_ulimits = ["nofile=1024:1048576", "core=-1"]
        default_mounts = ["/etc/shared:/etc/shared"]
        hooks_dir = ["/etc/hooks.d", "/etc/none.d"]
        [runtimes.runc]
        path = "runc"
        cgroup_writable = true
        base_runtime_spec = "/etc/base.json"
        cni_conf_dir = "/etc/net"
    """
    assert [level for level, _ in node.found(sound)] == [Level.OK]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cgroup_writable = true", "cgroup_writable needs cgroup version 2, and this node has version 1"),
        ('base_runtime_spec = "/etc/none.json"', "etc/none.json cannot be read: No such file or directory"),
        ('cni_conf_dir = "/etc/none.d"', "no CNI configuration in "),
    ],
)
def test_an_option_of_a_handler_is_graver_for_the_default(node: Examined, setting: str, words: str) -> None:
    node.write("proc/self/mountinfo", V1 + V2)
    for name, level in (("runc", Level.MISSING), ("other", Level.WARNING)):
        other = '[runtimes.runc]\npath = "runc"\n' if name != "runc" else ""
        ((found, told),) = node.found(f'{other}[runtimes.{name}]\npath = "runc"\n{setting}\n')
        assert found is level
        assert told.startswith(f"[runtimes.{name}] ")
        assert words in told


@pytest.mark.parametrize(
    ("setting", "level", "words"),
    [
        ('default_sysctls = ["net.ipv4.no_such=1"]', Level.MISSING, "has net.ipv4.no_such, and this kernel does not"),
        ('default_sysctls = ["vm.swappiness=1"]', Level.MISSING, "does not belong to a namespace"),
        ('default_mounts = ["/etc/none:/etc/in"]', Level.MISSING, "/etc/none, which does not exist"),
        ('default_ulimits = ["nofile=1024:1048577"]', Level.MISSING, "fs.nr_open (1048576)"),
        ('default_ulimits = ["nofile=-1"]', Level.MISSING, "fs.nr_open (1048576)"),
        ('hooks_dir = ["/etc/bad.d"]', Level.MISSING, "a.json is not valid JSON"),
        ('hooks_dir = ["/etc/hooks.d"]', Level.WARNING, "runs /usr/bin/hook, which is not an executable"),
    ],
)
def test_what_all_pods_get(node: Examined, setting: str, level: Level, words: str) -> None:
    node.write("etc/hooks.d/a.json", json.dumps(HOOK))
    node.write("etc/bad.d/a.json", "{")
    ((found, told),) = node.found(f"[runtime]\n{setting}\n")
    assert found is level
    assert words in told


def test_a_second_socket_that_is_not_served(node: Examined) -> None:
    ((level, told),) = node.found('[grpc]\ncontainerd_address = "/run/containerd/containerd.sock"\n')
    assert level is Level.WARNING
    assert "containerd is installed (/usr/bin/containerd)" in told


def test_files_that_root_alone_may_read_are_read_by_root_alone(node: Examined) -> None:
    config = load(None)
    defaults = dataclasses.replace(config.pod_defaults, hooks_dir=("/etc/bad.d",))
    node.write("etc/bad.d/a.json", "{")
    host = ExaminedNode(root=str(node.root), privileged=False, which=lambda _: None)
    (found,) = unmet_settings.check(host, dataclasses.replace(config, pod_defaults=defaults))
    assert found.level is Level.OK
