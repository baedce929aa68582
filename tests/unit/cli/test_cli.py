"""The command line's parser."""

from __future__ import annotations

import pytest

from criserver.cli import parser


@pytest.mark.parametrize("command", ["serve", "check", "status", "image list", "config show", "pod remove 4f"])
def test_the_configuration_may_be_named_before_or_after_the_command(command: str) -> None:
    words = command.split()
    assert parser().parse_args(["--config", "a.toml", *words]).config == "a.toml"
    assert parser().parse_args([*words, "--config", "a.toml"]).config == "a.toml"
    assert parser().parse_args(["--config", "b.toml", *words, "--config", "a.toml"]).config == "a.toml"
    assert parser().parse_args(words).config is None


@pytest.mark.parametrize("words", ["logs a -n -1", "logs a -n x", "ps --json -q", "inspect", "image"])
def test_a_wrong_command_line_exits_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words.split())
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
