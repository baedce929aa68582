"""The completion scripts, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

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
        ("criserver ps --al", {"--all"}),
        ("criserver logs abc --f", {"--follow"}),
        ("criserver nothing-like-this x", set()),
    ],
)
def test_bash_completes_commands_and_options(line: str, offered: set[str]) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize("autoloaded", [False, True])
def test_zsh_offers_what_may_follow(tmp_path: Path, autoloaded: bool) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_criserver").write_text(script(parser(), "zsh"))
    load = f"fpath=({tmp_path}); autoload -U _criserver" if autoloaded else f"source {tmp_path}/_criserver"
    stubs = 'compdef() { :; }; compadd() { shift; print -l -- "$@"; }'
    for words, wanted in (("criserver image ''", {"pull", "prune", "--help"}), ("criserver ps ''", {"--all", "--pod"})):
        run = f"{stubs}; {load}; words=({words}); CURRENT=${{#words}}; _criserver"
        done = subprocess.run(["zsh", "-f", "-c", run], capture_output=True, text=True, check=True)
        assert wanted <= set(done.stdout.split())
        assert done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_the_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script(parser(), shell), text=True, check=True)


def test_every_command_is_in_the_script_of_fish() -> None:
    text = script(parser(), "fish")
    assert "-a status -d" in text
    assert "__fish_seen_subcommand_from image; and __fish_seen_subcommand_from prune' -l dry-run" in text
