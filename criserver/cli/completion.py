"""``criserver completion SHELL``: a script that completes commands and options, made from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

SHELLS = ("bash", "fish", "zsh")


@dataclass(frozen=True, slots=True)
class _Command:
    """A command by the words that lead to it, () for criserver itself; ``commands`` and ``options`` have their help."""

    path: tuple[str, ...]
    commands: dict[str, str]
    options: dict[str, str]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for "bash", "fish" or "zsh"."""
    commands = list(_walk(parser, ()))
    return {"bash": _bash, "fish": _fish, "zsh": _zsh}[shell](commands)


def _walk(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[_Command]:
    children: dict[str, argparse.ArgumentParser] = {}
    helps: dict[str, str] = {}
    options: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            children = action.choices
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for option in action.option_strings:
            if option.startswith("--"):
                options[option] = action.help or ""
    yield _Command(path, {name: helps.get(name, "") for name in children}, options)
    for name, child in children.items():
        yield from _walk(child, (*path, name))


def _cases(commands: list[_Command]) -> tuple[str, str]:
    """Two parts of ``case``, in bash and zsh: the patterns of all commands, and the words that may follow each."""
    paths = "|".join(shlex.quote(" ".join(c.path)) for c in commands if c.path)
    cases = "\n".join(
        f"        {shlex.quote(' '.join(c.path))}) found={shlex.quote(' '.join((*c.commands, *c.options)))} ;;"
        for c in commands
    )
    return paths, cases


def _search(commands: list[_Command], words: str, first: int, end: str) -> str:
    """Shell code that sets ``found`` by the array ``words``, from the index ``first`` up to the variable ``end``."""
    paths, cases = _cases(commands)
    return f"""    local at='' next found='' i
    for ((i = {first}; i < {end}; i++)); do
        next="${{at:+$at }}${{{words}[i]}}"
        case "$next" in
        {paths}) at="$next" ;;
        esac
    done
    case "$at" in
{cases}
    esac"""


def _zsh(commands: list[_Command]) -> str:
    """As a file of $fpath it is the function's body, else it defines the function."""
    return f"""#compdef criserver
_criserver() {{
{_search(commands, "words", 2, "CURRENT")}
    compadd -- ${{=found}} || _files
}}
if [[ "${{funcstack[1]}}" == _criserver ]]; then
    _criserver "$@"
else
    compdef _criserver criserver
fi
"""


def _bash(commands: list[_Command]) -> str:
    return f"""_criserver() {{
{_search(commands, "COMP_WORDS", 1, "COMP_CWORD")}
    COMPREPLY=($(compgen -W "$found" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _criserver criserver
"""


def _fish(commands: list[_Command]) -> str:
    lines = []
    for command in commands:
        conditions = [f"__fish_seen_subcommand_from {name}" for name in command.path] or ["true"]
        if command.commands:
            unseen = f"not __fish_seen_subcommand_from {' '.join(command.commands)}"
            at = shlex.quote("; and ".join((*conditions, unseen)))
            for name, words in command.commands.items():
                lines.append(f"complete -c criserver -f -n {at} -a {name} -d {shlex.quote(words)}")
        at = shlex.quote("; and ".join(conditions))
        for option, words in command.options.items():
            lines.append(f"complete -c criserver -n {at} -l {option[2:]} -d {shlex.quote(words)}")
    return "\n".join(lines) + "\n"
