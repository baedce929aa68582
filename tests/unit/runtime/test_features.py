"""Features of a runtime that cannot report them now: they are not taken for missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from criserver.errors import FailedPreconditionError, UnavailableError
from criserver.runtime import oci_runtime
from criserver.runtime.features import probe_all
from criserver.runtime.oci_runtime import OciRuntime
from snapshotter import HelperKilledError, Snapshotter

REPORT = {
    "ociVersionMin": "1.0.0",
    "mountOptions": ["rro"],
    "linux": {"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": True}}},
}
KILLED = "#!/bin/sh\nkill -KILL $$\n"
HANGS = "#!/bin/sh\nexec sleep 60\n"


class FakeSnapshotter:
    """Says whether snapshots can be mounted for user namespaces, or raises."""

    def __init__(self, *answers: str | Exception) -> None:
        self._answers = list(answers)

    async def idmap_trouble(self) -> str:
        answer = self._answers.pop(0) if self._answers else ""
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "runtime"
    write(path, f"#!/bin/sh\necho '{json.dumps(REPORT)}'\n")
    return path


def write(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


async def features_of(program: Path, *answers: str | Exception) -> Any:
    runtime = OciRuntime("runc", str(program), str(program.parent))
    snapshotter = cast("Snapshotter", FakeSnapshotter(*answers))
    return (await probe_all([runtime], snapshotter))["runc"]


async def test_all_that_is_reported_is_known(program: Path) -> None:
    features = await features_of(program)
    assert (features.user_namespaces, features.recursive_readonly_mounts, features.unknown) == (True, True, "")


@pytest.mark.parametrize(
    ("script", "reason"), [(KILLED, "was ended by signal 9"), (HANGS, "does not end in time")], ids=["killed", "hangs"]
)
async def test_a_runtime_that_is_killed_or_hangs_may_report_later(
    program: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    if script is HANGS:
        monkeypatch.setattr(oci_runtime, "_FEATURES_TIMEOUT", 0.1)
    write(program, script)
    features = await features_of(program)
    assert not features.user_namespaces
    assert features.unknown == f"{program} features {reason}"
    error = features.lacking("pod a")
    assert isinstance(error, UnavailableError)
    assert str(error).startswith("pod a; whether the runtime has that is not known yet: ")


async def test_a_trial_of_mapped_mounts_that_is_killed_leaves_the_other_features(program: Path) -> None:
    features = await features_of(program, HelperKilledError("killed"))
    assert (features.user_namespaces, features.recursive_readonly_mounts, features.unknown) == (False, True, "killed")


@pytest.mark.parametrize(
    "script", ["\x7fELF of another machine", "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho '{'\n"], ids=["elf", "old", "odd"]
)
async def test_a_runtime_that_cannot_report_is_not_asked_again(program: Path, script: str) -> None:
    write(program, script)
    features = await features_of(program)
    assert (features.user_namespaces, features.unknown) == (False, "")
    assert isinstance(features.lacking("pod a"), FailedPreconditionError)
