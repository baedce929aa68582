"""The systemd unit: it is valid, each setting is explained, and no setting harms containers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNIT = (ROOT / "contrib/systemd/criserver.service").read_text()
PAGE = (ROOT / "docs/systemd.md").read_text()


def set_lines() -> set[str]:
    return set(re.findall(r"^([A-Za-z]+)=", UNIT, re.MULTILINE))


def named_in(title: str) -> set[str]:
    """The settings in the first column of the table below a title."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([A-Za-z]+)`", cell)}


def test_every_line_of_the_unit_is_explained() -> None:
    plain = {"Description", "Documentation", "ExecStart", "WantedBy"}
    assert named_in("The unit") == set_lines() - plain


def test_nothing_is_set_that_containers_inherit_or_that_hides_mounts() -> None:
    left_out = named_in("What is not set")
    assert {"NoNewPrivileges", "SystemCallFilter", "ProtectSystem", "PrivateMounts"} <= left_out
    assert set_lines() & left_out == set()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    # Its program is looked for, and is installed nowhere here.
    unit = tmp_path / "criserver.service"
    unit.write_text(UNIT.replace("/usr/bin/criserver serve", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
