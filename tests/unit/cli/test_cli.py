"""The command line's parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.cli import main, parsed, parser
from criserver.cli.options import address
from criserver.errors import InvalidArgumentError


@pytest.mark.parametrize("command", ["serve", "check", "status", "image list", "config show", "pod remove 4f"])
def test_the_configuration_may_be_named_before_or_after_the_command(command: str) -> None:
    words = command.split()
    assert parser().parse_args(["--config", "a.toml", *words]).config == "a.toml"
    assert parser().parse_args([*words, "--config", "a.toml"]).config == "a.toml"
    assert parser().parse_args(["--config", "b.toml", *words, "--config", "a.toml"]).config == "a.toml"
    assert parser().parse_args(words).config is None


@pytest.mark.parametrize("command", ["status", "image list", "pod remove 4f", "debug bundle"])
def test_the_socket_may_be_named_before_or_after_the_command(command: str) -> None:
    words = command.split()
    for line in (["--address", "/a.sock", *words], [*words, "--address", "unix:///a.sock"]):
        assert address(parsed([*line, "--config", "/there/is/none"])) == "/a.sock"
    with pytest.raises(InvalidArgumentError, match=r"--address a\.sock: give the absolute path"):
        address(parsed(["--address", "a.sock", *words]))


@pytest.mark.parametrize("command", ["serve", "check", "config show", "reset"])
def test_a_command_that_asks_no_daemon_takes_no_socket(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(["--address", "/a.sock", *command.split()])
    assert ended.value.code == 2
    assert "--address is for commands that ask a running daemon" in capsys.readouterr().err


def test_a_file_that_is_no_socket_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    for wanted in ("no daemon answers at", "is not a socket"):
        assert main(["--address", str(path), "pods"]) == 3
        assert f"{wanted} " in capsys.readouterr().err.replace(";", " ")
        path.touch()


@pytest.mark.parametrize("words", ["logs a -n -1", "logs a -n x", "ps --json -q", "inspect", "image"])
def test_a_wrong_command_line_exits_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words.split())
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
