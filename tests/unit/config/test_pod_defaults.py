"""What the node gives to all pods, as the configuration says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.config import load
from criserver.errors import InvalidArgumentError


def test_the_values_are_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[runtime]\ndefault_ulimits = ["nofile=1:2", "core=0", "memlock=5:-1"]\n'
        'default_sysctls = ["net.ipv4.tcp_rmem=1 2 3", "kernel.domainname=a=b"]\ndefault_mounts = ["/a:/b"]\n'
    )
    found = load(str(path)).pod_defaults
    assert found.ulimits == {"RLIMIT_NOFILE": (1, 2), "RLIMIT_CORE": (0, 0), "RLIMIT_MEMLOCK": (5, 2**64 - 1)}
    assert found.sysctls == {"net.ipv4.tcp_rmem": "1 2 3", "kernel.domainname": "a=b"}
    assert found.mounts == (("/a", "/b"),)
    assert (found.shm_size, found.hooks_dir, found.env) == (64 << 20, (), ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('default_ulimits = ["nofile=2:1"]', "soft limit is above the hard one"),
        ('default_ulimits = ["nofile=-1:1"]', "soft limit is above the hard one"),
        ('default_ulimits = ["files=1"]', "runtime.default_ulimits.0 = 'files=1'"),
        ('default_ulimits = ["nofile=1:2:3"]', "runtime.default_ulimits.0"),
        ('default_sysctls = ["net.core"]', "runtime.default_sysctls.0"),
        ('default_env = ["=x"]', "runtime.default_env.0"),
        ('default_mounts = ["a:/b"]', "runtime.default_mounts.0"),
        ('default_mounts = ["/a:/b:rw"]', "runtime.default_mounts.0"),
        ('hooks_dir = ["hooks"]', "runtime.hooks_dir.0"),
        ("shm_size = 0", "runtime.shm_size"),
    ],
)
def test_a_mistake_is_told_by_its_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[runtime]\n{text}\n")
    with pytest.raises(InvalidArgumentError) as e:
        load(str(path))
    assert words in str(e.value)
