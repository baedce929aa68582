"""Which containers get the hooks of the node's directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.oci.hook_files import chosen, load

HOOK = {"version": "1.0.0", "hook": {"path": "/h"}, "when": {"always": True}, "stages": ["prestart"]}


def written(directory: Path, name: str, **changes: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps({**HOOK, **changes}))
    return str(directory)


@pytest.mark.parametrize(
    ("when", "matches"),
    [
        ({}, False),
        ({"always": True}, True),
        ({"always": False}, False),
        ({"always": False, "commands": ["."]}, False),
        ({"commands": ["^/bin/s", "no"]}, True),
        ({"commands": ["^sh$"]}, False),
        ({"hasBindMounts": True}, True),
        ({"hasBindMounts": False}, False),
        ({"annotations": {"^k": "^v"}}, True),
        ({"annotations": {"^k": "^w"}}, False),
        ({"annotations": {"^k": "^v", "^other": "."}}, False),
        ({"annotations": {"^k$": "^x$"}}, False),
        ({"annotations": {"^k": "v"}, "commands": ["sh$"], "hasBindMounts": True}, True),
        ({"annotations": {"^k": "v"}, "commands": ["no"]}, False),
    ],
)
def test_all_conditions_must_hold_and_there_must_be_one(tmp_path: Path, when: dict[str, Any], matches: bool) -> None:
    hooks = load([written(tmp_path, "a.json", when=when)])
    annotations = {"k1": "v1", "x": "x"}
    assert list(chosen(hooks, "/bin/sh", annotations, has_bind_mounts=True)) == [("prestart", {"path": "/h"})] * matches


def test_a_container_without_mounts_does_not_match_has_bind_mounts(tmp_path: Path) -> None:
    hooks = load([written(tmp_path, "a.json", when={"hasBindMounts": True})])
    assert list(chosen(hooks, "sh", {}, has_bind_mounts=False)) == []


@pytest.mark.parametrize(
    ("command", "annotations", "words"),
    [
        ("x" * 4097, {}, "the name of the container's program has 4097 characters"),
        ("x" * 3_000_000, {}, "the name of the container's program has 3000000 characters"),
        ("sh", {"x": "", "k\u017f": "v" * 4097}, "the value of the annotation 'k\u017f' has 4097 characters"),
    ],
)
def test_a_text_that_would_hold_up_the_daemon_is_refused(
    tmp_path: Path, command: str, annotations: dict[str, str], words: str
) -> None:
    hooks = load([written(tmp_path, "a.json", when={"commands": [".*/init$"], "annotations": {"^k": ".*/v$"}})])
    with pytest.raises(InvalidArgumentError, match=f"^{words}; with the hooks of runtime.hooks_dir at most 4096"):
        list(chosen(hooks, command, annotations, has_bind_mounts=False))


def test_a_long_text_that_no_pattern_is_for_is_no_matter(tmp_path: Path) -> None:
    applied = {"kubectl.kubernetes.io/last-applied-configuration": "{" * 100_000, "k": "/" * 4096}
    hooks = load([written(tmp_path, "a.json", when={"annotations": {"^k$": "^/*$"}})])
    assert len(list(chosen(hooks, "x" * 100_000, applied, has_bind_mounts=False))) == 1
    hooks = load([written(tmp_path, "a.json", when={"commands": ["^/*$"]})])
    assert len(list(chosen(hooks, "/" * 4096, applied, has_bind_mounts=False))) == 1


def test_later_directories_replace_files_and_names_give_the_order(tmp_path: Path) -> None:
    for name in ("2.json", "B.json", "a.json", "none.txt"):
        written(tmp_path / "1", name, hook={"path": f"/1/{name}"})
    written(tmp_path / "2", "a.json", hook={"path": "/2/a.json"}, stages=["poststop", "createRuntime"])
    hooks = load([str(tmp_path / "1"), str(tmp_path / "none"), str(tmp_path / "2")])
    found = [(stage, hook["path"]) for stage, hook in chosen(hooks, "sh", {}, has_bind_mounts=False)]
    assert found == [
        ("prestart", "/1/2.json"),
        ("poststop", "/2/a.json"),
        ("createRuntime", "/2/a.json"),
        ("prestart", "/1/B.json"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.1.0"}, "key version"),
        ({"hook": {"path": "h"}}, "key hook.path"),
        ({"stages": []}, "key stages"),
        ({"stages": ["start"]}, "key stages.0"),
        ({"when": {"commands": "sh"}}, "key when.commands"),
        ({"when": {"sometimes": True}}, "sometimes"),
        ({"when": {"commands": ["("]}}, "not a regular expression"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    directory = written(tmp_path, "a.json", **changes)
    with pytest.raises(FailedPreconditionError, match=words) as e:
        load([directory])
    assert f"{directory}/a.json" in str(e.value)
