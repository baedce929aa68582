"""The completion scripts, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from criserver.cli import parser
from criserver.cli.completion import SHELLS, script


def completed(line: str) -> set[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _criserver; echo "${{COMPREPLY[@]}}"'
    run = f"{script(parser(), 'bash')}\n{asked}"
    return set(subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("criserver sta", {"status"}),
        ("criserver image p", {"pull", "pin", "prune"}),
        ("criserver --config x image prune --d", {"--dry-run"}),
        ("criserver ps --a", {"--all"}),
        ("criserver logs abc --f", {"--follow"}),
        ("criserver nothing-like-this x", set()),
    ],
)
def test_bash_completes_commands_and_options(line: str, offered: set[str]) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_the_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script(parser(), shell), text=True, check=True)


def test_every_command_is_in_the_script_of_fish() -> None:
    text = script(parser(), "fish")
    assert "-a status -d" in text
    assert "__fish_seen_subcommand_from image; and __fish_seen_subcommand_from prune' -l dry-run" in text
