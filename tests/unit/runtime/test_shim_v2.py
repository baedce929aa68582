"""A shim as its handler has it: how it is found, and how the daemon cleans up after one that is gone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from criserver.config import RuntimeHandler
from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.runtime.runtime_choice import runtime_of
from criserver.runtime.shim_v2 import ShimV2
from shims import task_wire


@pytest.fixture
def shim(tmp_path: Path) -> ShimV2:
    """A shim whose program writes its arguments down, with a bundle "c" that it may have something of."""
    program(tmp_path, 'echo "$@" >> called')
    (tmp_path / "containers/c").mkdir(parents=True)
    (tmp_path / "socket").touch()
    mark(tmp_path, {"address": f"unix://{tmp_path}/socket", "version": 3})
    return ShimV2.of(RuntimeHandler("kata", shim=str(tmp_path / "program")), str(tmp_path), str(tmp_path / "shims"))


def program(tmp_path: Path, script: str) -> None:
    (tmp_path / "program").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "program").chmod(0o755)


def mark(tmp_path: Path, found: object) -> None:
    (tmp_path / "containers/c/task.json").write_text(json.dumps(found))


def test_a_shim_is_found_by_its_name_as_containerd_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = runtime_of(RuntimeHandler("kata", shim="io.containerd.kata.v2"), str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"containerd-shim-kata-v2 .* \[runtimes.kata\]"):
        found.launch("")
    program(tmp_path, "true")
    os.rename(tmp_path / "program", tmp_path / "containerd-shim-kata-v2")
    launch = found.within("/pod").launch("")
    assert launch["task"]["command"] == [str(tmp_path / "containerd-shim-kata-v2")]
    assert launch["task_of"] == "/pod/task.json"


def test_options_that_the_shim_has_not_are_told_with_their_table(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\[runtimes.a.options\]: unknown key Rot"):
        runtime_of(RuntimeHandler("a", shim="io.containerd.runc.v2", options={"Rot": 1}), str(tmp_path))


def test_the_shim_for_runc_is_told_who_owns_the_streams(tmp_path: Path) -> None:
    program(tmp_path, "true")
    os.rename(tmp_path / "program", tmp_path / "containerd-shim-runc-v2")

    def options(owner: tuple[int, int] | None, **given: int) -> str:
        handler = RuntimeHandler("r", shim=str(tmp_path / "containerd-shim-runc-v2"), options=given)
        return ShimV2.of(handler, str(tmp_path), str(tmp_path)).launch("", owner)["task"]["options"]

    owned, chosen = ((task_wire.number(4, uid) + task_wire.number(5, 1_000_050)).hex() for uid in (1_001_000, 7))
    assert options((1_001_000, 1_000_050)) == owned + options(None)
    assert options((1_001_000, 1_000_050), IoUid=7) == chosen + options(None)


@pytest.mark.parametrize("joined", [False, True])
async def test_its_program_cleans_up_once(shim: ShimV2, tmp_path: Path, joined: bool) -> None:
    mark(tmp_path, {"address": f"unix://{tmp_path}/socket", "joined": joined})
    bundle = tmp_path / "containers/c"
    assert await shim.delete("c", "")
    assert await shim.delete("c", "")
    (called,) = (bundle / "called").read_text().splitlines()
    assert called.endswith(f"-bundle {bundle} -id c delete")
    assert not shim.has("c")
    assert (tmp_path / "socket").exists() is joined


@pytest.mark.parametrize(
    ("script", "again", "words"), [("echo why >&2; exit 1", True, "why"), (None, False, "not an executable")]
)
async def test_a_program_that_fails_is_logged_and_its_work_is_done_by_the_daemon(
    shim: ShimV2, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str | None, again: bool, words: str
) -> None:
    program(tmp_path, script or "")
    if script is None:
        os.unlink(tmp_path / "program")
    assert await shim.delete("c", "") is again
    assert words in capsys.readouterr().out
    assert shim.has("c")
    await shim.forget("c")
    assert not shim.has("c")
