"""Labels of a container's files, and of volumes; on a kernel without SELinux a label is an attribute like others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver.errors import InvalidArgumentError
from criserver.runtime import selinux

PROCESS = "system_u:system_r:container_t:s0:c1,c2"
FILES = "system_u:object_r:container_file_t:s0:c1,c2"


def test_files_have_the_processs_user_and_level_and_the_type_of_files():
    assert selinux.file_label(PROCESS, "container_file_t") == FILES
    assert selinux.file_label("") == ""


def test_the_type_of_files_is_the_policys(tmp_path: Path):
    (tmp_path / "config").write_text("# a comment = 1\nSELINUX=enforcing\nSELINUXTYPE=strict\n")
    contexts = tmp_path / "strict/contexts/lxc_contexts"
    contexts.parent.mkdir(parents=True)
    contexts.write_text('process = "system_u:system_r:pod_t:s0"\nfile = "system_u:object_r:pod_file_t:s0"\n')
    assert selinux.file_type(str(tmp_path)) == "pod_file_t"
    assert selinux.file_type(str(tmp_path / "none")) == "container_file_t"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set such attributes")
@pytest.mark.skipif(selinux.is_enabled(), reason="the policy may not have this label")
def test_a_volume_is_labelled_and_what_its_links_lead_to_is_not(tmp_path: Path):
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


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/var/lib"])
def test_the_nodes_own_directories_are_not_labelled(path: str):
    with pytest.raises(InvalidArgumentError, match="node's own"):
        selinux.relabel(path, FILES)
