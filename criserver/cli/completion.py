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
    if shell == "fish":
        return _fish(commands)
    # zsh runs bash's completion functions by a module of its own.
    before = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return before + _bash(commands)


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


def _bash(commands: list[_Command]) -> str:
    paths = "|".join(shlex.quote(" ".join(c.path)) for c in commands if c.path)
    cases = "\n".join(
        f"        {shlex.quote(' '.join(c.path))}) words={shlex.quote(' '.join((*c.commands, *c.options)))} ;;"
        for c in commands
    )
    return f"""_criserver() {{
    local path='' next words='' i
    for ((i = 1; i < COMP_CWORD; i++)); do
        next="${{path:+$path }}${{COMP_WORDS[i]}}"
        case "$next" in
        {paths}) path="$next" ;;
        esac
    done
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
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
