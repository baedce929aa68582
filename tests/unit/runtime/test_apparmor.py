"""Which AppArmor profile a container runs under, and the text of the default one."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable

import pytest

from criserver.errors import FailedPreconditionError
from criserver.model import ContainerConfig, Security
from criserver.runtime import apparmor, host
from tests.support.samples import CONFIG

PARSER = shutil.which("apparmor_parser", path="/usr/sbin:/sbin")


def asking(profile: str) -> ContainerConfig:
    return dataclasses.replace(CONFIG, security=Security(apparmor=profile))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what is loaded (None: no AppArmor in the kernel), and whether loading the default succeeds."""

    def make(loaded: set[str] | None, loads: bool = False) -> None:
        async def load() -> bool:
            if loads and loaded is not None:
                loaded.add(apparmor.DEFAULT)
            return loads

        monkeypatch.setattr(host, "apparmor_profiles", lambda: loaded)
        monkeypatch.setattr(apparmor, "load", load)

    return make


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("", "criserver-default"),
        ("runtime/default", "criserver-default"),
        ("unconfined", "unconfined"),
        ("own", "own"),
    ],
)
async def test_what_is_asked_for_is_what_the_container_has(node: Callable[..., None], asked: str, chosen: str) -> None:
    node({"criserver-default", "own"})
    assert await apparmor.choose(asking(asked)) == chosen


async def test_a_profile_that_is_not_loaded_is_refused(node: Callable[..., None]) -> None:
    node({"criserver-default"})
    with pytest.raises(FailedPreconditionError, match=r"'own' is not loaded.*apparmor_parser"):
        await apparmor.choose(asking("own"))


async def test_a_default_that_somebody_unloaded_is_loaded_again(node: Callable[..., None]) -> None:
    node(set(), loads=True)
    assert await apparmor.choose(asking("")) == "criserver-default"


async def test_a_default_that_cannot_be_had_is_refused_only_where_it_is_asked_for(node: Callable[..., None]) -> None:
    node({"own"})
    assert await apparmor.choose(asking("")) == "unconfined"
    with pytest.raises(FailedPreconditionError, match="default AppArmor profile"):
        await apparmor.choose(asking("runtime/default"))


async def test_a_node_without_apparmor_has_no_profiles(node: Callable[..., None]) -> None:
    node(None)
    for asked in ("", "runtime/default", "unconfined"):
        assert await apparmor.choose(asking(asked)) == ""
    with pytest.raises(FailedPreconditionError, match=r"'own'.*no AppArmor"):
        await apparmor.choose(asking("own"))


@pytest.mark.skipif(PARSER is None, reason="apparmor_parser is not on this machine")
def test_the_default_profile_is_one() -> None:
    assert PARSER is not None
    command = [PARSER, "--skip-kernel-load", "--skip-cache", "--stdout"]
    compiled = subprocess.run(command, input=apparmor.profile().encode(), capture_output=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    assert b"criserver-default" in compiled.stdout
