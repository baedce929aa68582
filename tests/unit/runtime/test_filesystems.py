"""Host paths of mounts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from criserver.model import Mount, Propagation
from criserver.runtime import filesystems


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_a_missing_host_path_that_another_container_makes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "new"

    def is_made_meanwhile(_: str) -> bool:
        make(path)
        return False

    with monkeypatch.context() as patched:
        patched.setattr(os.path, "lexists", is_made_meanwhile)
        mount = filesystems._resolved(Mount("/m", str(path), False, Propagation.PRIVATE))
    assert mount.host_path == str(path)
