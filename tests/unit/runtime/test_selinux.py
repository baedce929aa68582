"""SELinux labels of a container's files and of volumes. Without SELinux a label is an ordinary attribute."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.model import Security, SelinuxOptions
from criserver.runtime import selinux
from tests.support.descriptors import room_for

PROCESS = "system_u:system_r:container_t:s0:c1,c2"
FILES = "system_u:object_r:container_file_t:s0:c1,c2"


NOBODY: frozenset[str] = frozenset()


class Policy:
    """A loaded policy: one that knows labels of these types, with levels that begin with s0 and a colon, or are s0."""

    types = frozenset({"container_t", "container_file_t", "spc_t", "own_t"})

    def knows(self, label: str) -> bool:
        kind, level = label.split(":", 3)[2:]
        return kind in self.types and (level == "s0" or level.startswith("s0:"))


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    policy = Policy()
    monkeypatch.setattr(selinux, "is_enabled", lambda: True)
    monkeypatch.setattr(selinux, "_is_known", policy.knows)
    monkeypatch.setattr(selinux, "types", lambda: ("container_t", "container_file_t"))
    monkeypatch.setattr(selinux, "labels_containers", selinux.labels_containers.__wrapped__)
    return policy


@pytest.fixture
def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "is_enabled", lambda: False)
    monkeypatch.setattr(selinux, "labels_containers", selinux.labels_containers.__wrapped__)


def asking(*, privileged: bool = False, **options: str) -> Security:
    return Security(privileged=privileged, selinux=SelinuxOptions(**options))


def test_each_pod_has_two_categories_that_no_other_has(policy: Policy) -> None:
    levels: set[str] = set()
    for _ in range(50):
        level = selinux.pod_level(SelinuxOptions(), levels)
        assert level not in levels
        numbers = [int(part.removeprefix("c")) for part in level.removeprefix("s0:").split(",")]
        assert 0 <= numbers[0] < numbers[1] < 1024
        levels.add(level)


def test_taken_categories_are_not_given_again(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([[7, 3], [7, 3], [2, 1]])
    monkeypatch.setattr(secrets.SystemRandom, "sample", lambda *_: next(drawn))
    assert selinux.pod_level(SelinuxOptions(), {"s0:c3,c7"}) == "s0:c1,c2"


def test_a_pods_level_is_what_it_asks_for(policy: Policy) -> None:
    assert selinux.pod_level(SelinuxOptions(level="s0:c9"), {"s0:c9"}) == "s0:c9"
    with pytest.raises(InvalidArgumentError, match=r"does not know the label .*:s0,c9"):
        selinux.pod_level(SelinuxOptions(level="s0,c9"), NOBODY)


def test_a_policy_without_types_for_containers_labels_none_by_itself(policy: Policy) -> None:
    policy.types = frozenset({"own_t", "container_file_t"})
    assert selinux.pod_level(SelinuxOptions(), NOBODY) == ""
    assert selinux.labels(asking(), "") == ("", "")
    assert selinux.labels(asking(type="own_t"), "").process == "system_u:system_r:own_t:s0"


@pytest.mark.parametrize(
    ("asked", "process", "files"),
    [
        ({}, PROCESS, FILES),
        ({"type": "own_t"}, "system_u:system_r:own_t:s0:c1,c2", FILES),
        ({"level": "s0:c3"}, "system_u:system_r:container_t:s0:c3", "system_u:object_r:container_file_t:s0:c3"),
        ({"user": "u", "role": "r"}, "u:r:container_t:s0:c1,c2", "u:object_r:container_file_t:s0:c1,c2"),
        ({"privileged": True}, "system_u:system_r:spc_t:s0", FILES),
        ({"privileged": True, "type": "own_t"}, "system_u:system_r:own_t:s0", FILES),
    ],
)
def test_a_container_has_what_it_asks_for_and_the_rest_of_its_pod(
    policy: Policy, asked: dict[str, Any], process: str, files: str
) -> None:
    assert selinux.labels(asking(**asked), "s0:c1,c2") == (process, files)


@pytest.mark.parametrize("asked", [{"type": "unknown_t"}, {"level": "s0,c1"}, {"level": "s0,c1", "privileged": True}])
def test_a_label_that_the_policy_does_not_know_is_refused(policy: Policy, asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"container c: .*does not know the label"):
        selinux.check(asking(**asked), "s0:c1,c2", "container c")


def test_without_a_policy_nothing_is_labelled(no_policy: None) -> None:
    assert selinux.pod_level(SelinuxOptions(level="s0:c9"), NOBODY) == ""
    assert selinux.labels(asking(type="spc_t"), "") == ("", "")
    assert selinux.pod_files("") == ""
    for asked in (asking(), asking(type="spc_t"), asking(type="container_t", privileged=True)):
        selinux.check(asked, "", "container c")
        assert selinux.ignored(asked) == ""
    asked = asking(type="container_t", level="s0:c9")
    selinux.check(asked, "", "container c")
    assert selinux.ignored(asked) == "type = container_t, level = s0:c9"


def test_with_a_policy_no_option_is_ignored(policy: Policy) -> None:
    assert selinux.ignored(asking(type="container_t", level="s0:c9")) == ""


def test_the_types_are_the_policys(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"# a comment = \xe9\nSELINUX=enforcing\nSELINUXTYPE=strict\n")
    contexts = tmp_path / "strict/contexts/lxc_contexts"
    contexts.parent.mkdir(parents=True)
    contexts.write_text('process = "system_u:system_r:pod_t:s0"\nfile = "system_u:object_r:pod_file_t:s0"\n')
    assert selinux.types(str(tmp_path)) == ("pod_t", "pod_file_t")
    assert selinux.types(str(tmp_path / "none")) == ("container_t", "container_file_t")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set such attributes")
@pytest.mark.skipif(selinux.is_enabled(), reason="the policy may not have this label")
def test_a_volume_is_labelled_and_what_its_links_lead_to_is_not(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("not the container's")
    volume = tmp_path / "volume"
    (volume / "a/b").mkdir(parents=True)
    (volume / "a/file").write_text("x")
    os.symlink(outside, volume / "link")
    os.symlink(tmp_path, volume / "a/up")
    selinux.relabel(str(volume), FILES)
    for path in (volume, volume / "a", volume / "a/b", volume / "a/file"):
        assert os.getxattr(path, "security.selinux") == FILES.encode() + b"\0"
    for link in (volume / "link", volume / "a/up"):
        assert os.getxattr(link, "security.selinux", follow_symlinks=False) == FILES.encode() + b"\0"
    for path in (outside, tmp_path):
        with pytest.raises(OSError):
            os.getxattr(path, "security.selinux")


@pytest.mark.skipif(selinux.is_enabled(), reason="every file has a label there")
def test_a_file_system_without_labels_is_left_as_it_is() -> None:
    selinux.relabel("/proc/self/status", FILES)


def test_a_volume_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="No such file"):
        selinux.relabel(str(tmp_path / "none"), FILES)


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/var/lib"])
def test_the_nodes_own_directories_are_not_labelled(path: str) -> None:
    with pytest.raises(InvalidArgumentError, match="node's own"):
        selinux.relabel(path, FILES)


def test_without_descriptors_the_policy_is_not_taken_for_another(tmp_path: Path) -> None:
    """The answers are kept: all later containers would have no label, or another type."""
    (tmp_path / "config").write_text("SELINUXTYPE=own\n")
    for ask in (lambda: selinux._is_known(PROCESS), lambda: selinux.types.__wrapped__(str(tmp_path))):
        with room_for(0), pytest.raises(OSError, match="Too many open files"):
            ask()
