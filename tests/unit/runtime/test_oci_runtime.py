"""The command lines of OCI runtimes, and an OCI runtime that fails, hangs or is missing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from criserver.config import RuntimeHandler
from criserver.errors import DeadlineExceededError, FailedPreconditionError
from criserver.runtime import oci_runtime
from criserver.runtime.oci_runtime import OciRuntime
from tests.support.waiting import until

SLICE = "kubepods-pod1.slice"


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[OciRuntime]:
    """A runtime that writes down how it was called; a test replaces its program by :func:`program`.

    In the end a program that was killed is reaped, or asyncio would complain of it without its loop.
    """
    runtime = OciRuntime.of(RuntimeHandler("kata", str(tmp_path / "program")), str(tmp_path / "roots"))
    program(runtime, 'echo "$@" > "$(dirname "$0")/called"')
    yield runtime
    await until(lambda: not Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    await asyncio.sleep(0)


def program(runtime: OciRuntime, script: str) -> None:
    Path(runtime.path).write_text(f"#!/bin/sh\n{script}\n")
    os.chmod(runtime.path, 0o755)


def called(runtime: OciRuntime) -> list[str]:
    return Path(runtime.path).with_name("called").read_text().split()


def known(runtime: OciRuntime, container: str = "c") -> None:
    os.makedirs(os.path.join(runtime.root, container))


@pytest.mark.parametrize(("parent", "driver"), [("/kubepods/pod1", []), (SLICE, ["--systemd-cgroup"])])
def test_every_verb_begins_with_the_root_and_the_driver(runtime: OciRuntime, parent: str, driver: list[str]) -> None:
    assert runtime.root.endswith("/roots/kata")
    start = [runtime.path, "--root", runtime.root, *driver]
    assert runtime.command(parent) == start
    for command in (
        runtime.run_command("c", parent, bundle="/b"),
        runtime.delete_command("c", parent),
        runtime.checkpoint_command("c", parent, images="/i", work="/w"),
    ):
        assert command[: len(start)] == start
        assert command[-1] == "c"


def test_a_handler_may_have_a_root_and_options_of_its_own(runtime: OciRuntime, tmp_path: Path) -> None:
    handler = RuntimeHandler("runsc", runtime.path, args=("--platform=kvm",), root=str(tmp_path / "own"))
    command = OciRuntime.of(handler, str(tmp_path / "roots")).command("")
    assert command == [runtime.path, "--root", str(tmp_path / "own"), "--platform=kvm"]


def test_a_program_that_is_not_there_is_named_with_its_handler(runtime: OciRuntime) -> None:
    os.unlink(runtime.path)
    with pytest.raises(FailedPreconditionError, match=r"handler kata: .*/program is not an exec.*\[runtimes.kata\]"):
        runtime.command("/p")


async def test_a_container_that_the_runtime_has_not_needs_no_delete(runtime: OciRuntime) -> None:
    await runtime.delete("c", "/p")
    with pytest.raises(FileNotFoundError):
        called(runtime)
    known(runtime)
    await runtime.delete("c", "/p")
    assert called(runtime) == ["--root", runtime.root, "delete", "--force", "c"]


@pytest.mark.parametrize(
    "script", ["exit 1", "sleep 60", None, "\0"], ids=["fails", "hangs", "is not there", "is broken"]
)
async def test_a_delete_that_fails_is_logged(
    runtime: OciRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str | None
) -> None:
    known(runtime)
    if script == "sleep 60":
        monkeypatch.setattr(oci_runtime, "_DELETE_TIMEOUT", 0.2)
    if script is None:
        os.unlink(runtime.path)
    elif script == "\0":
        Path(runtime.path).write_bytes(b"\0")
    else:
        program(runtime, script)
    assert await runtime.delete("c", "/p") is (script == "exit 1")  # another try may help
    assert "runtime delete" in capsys.readouterr().out
    known(runtime, "c/inside")
    known(runtime, "other")
    await runtime.forget("c")
    await runtime.forget("c")
    assert os.listdir(runtime.root) == ["other"]


async def test_an_update_says_why_it_is_refused(runtime: OciRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    await runtime.update("c", SLICE, {"cpu": {"shares": 2}})
    assert called(runtime) == ["--root", runtime.root, "--systemd-cgroup", "update", "--resources", "-", "c"]
    program(runtime, "cat >/dev/null; echo one >&2; echo the last >&2; exit 1")
    with pytest.raises(FailedPreconditionError, match="container c cannot be given these limits: the last"):
        await runtime.update("c", "/p", {})
    monkeypatch.setattr(oci_runtime, "_UPDATE_TIMEOUT", 0.2)
    program(runtime, "sleep 60")
    with pytest.raises(DeadlineExceededError, match=r"did not update c within 0\.2 s"):
        await runtime.update("c", "/p", {})


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("""echo '{"linux": {}}'""", {"linux": {}}),
        ("echo '{}'", None),
        ("echo '[1]'", None),
        ("echo nonsense", None),
        ("exit 1", None),
    ],
)
async def test_features_are_what_the_runtime_tells_or_none(runtime: OciRuntime, script: str, told: object) -> None:
    program(runtime, script)
    assert await runtime.features() == told
