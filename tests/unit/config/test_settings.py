"""Drop-ins over the configuration file, and the text of the whole."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from criserver.cli import main
from criserver.config import load, read, text
from criserver.errors import InvalidArgumentError


def written(directory: Path, main_file: str | None = None, **drop_ins: str) -> str:
    """A configuration file, and drop-ins by their names without ".toml"."""
    (directory / "conf.d").mkdir()
    for name, content in drop_ins.items():
        (directory / "conf.d" / f"{name.replace('_', '-')}.toml").write_text(content)
    path = directory / "config.toml"
    if main_file is not None:
        path.write_text(main_file)
    return str(path)


def test_drop_ins_are_merged_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[log]\nlevel = "error"\n[cdi]\ndirs = ["/a", "/b"]',
        b_20='[log]\nlevel = "debug"\n[cdi]\ndirs = ["/c"]',
        a_10='[log]\nlevel = "warning"\nformat = "json"',
    )
    config = load(path)
    assert (config.log_level, config.log_format, config.cdi_dirs) == ("debug", "json", ("/c",))


def test_a_drop_in_adds_a_handler(tmp_path: Path) -> None:
    """As the drop-ins of device vendors do."""
    nvidia = '[runtimes.nvidia]\npath = "/usr/bin/nvidia-container-runtime"\n[runtime]\ndefault = "nvidia"'
    config = load(written(tmp_path, None, nvidia=nvidia), optional=True)
    assert list(config.runtimes) == ["runc", "nvidia"]
    assert config.default_runtime == "nvidia"


def test_the_files_own_handlers_replace_the_default_one(tmp_path: Path) -> None:
    path = written(
        tmp_path, '[runtimes.crun]\npath = "crun"\n[runtime]\ndefault = "crun"', x='[runtimes.kata]\npath = "kata"'
    )
    assert list(load(path).runtimes) == ["crun", "kata"]


@pytest.mark.parametrize(("first", "second"), [('"s"', "{ B = 1 }"), ("{ B = 1 }", '"s"'), ("[1]", "{ B = 1 }")])
def test_the_options_of_a_shim_may_get_another_type(tmp_path: Path, first: str, second: str) -> None:
    handler = '[runtime]\ndefault = "x"\n[runtimes.x]\nshim = "io.example.x.v2"\n[runtimes.x.options]\nA = '
    path = written(tmp_path, handler + first, x=f"[runtimes.x.options]\nA = {second}")
    assert load(path).runtimes["x"].options == tomllib.loads(f"A = {second}")
    assert tomllib.loads(text(read(path)))["runtimes"]["x"]["options"] == tomllib.loads(f"A = {second}")


@pytest.mark.parametrize(
    ("drop_in", "words"),
    [
        ("[log]\nlevel = 1", ["conf.d/x.toml", "log.level = 1"]),
        ("[runtimes.kata]", ["runtimes.kata has neither path", "nor shim"]),
        ("rubbish", ["conf.d/x.toml", "not valid TOML"]),
        ('[runtime]\ndefault = "kata"', ["conf.d/x.toml", "'kata'", "runc"]),
        ('[streaming]\ntls_cert = "/c"', ["conf.d/x.toml", "streaming.tls_key"]),
    ],
)
def test_a_mistake_is_told_with_the_drop_in(tmp_path: Path, drop_in: str, words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as e:
        load(written(tmp_path, "", x=drop_in))
    for word in words:
        assert word in str(e.value)


def test_other_files_are_no_drop_ins(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    for name in (".hidden.toml", "x.toml.bak", "README"):
        (tmp_path / "conf.d" / name).write_text("rubbish")
    assert load(path) == load(None)


def test_a_drop_in_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    (tmp_path / "conf.d" / "gone.toml").symlink_to("nowhere")
    with pytest.raises(InvalidArgumentError, match=r"conf.d/gone.toml: No such file"):
        load(path)


def test_the_text_has_each_value_and_who_set_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path, '[runtimes."a.b"]\npath = "a\\u007f\\"b"\n[runtime]\ndefault = "a.b"', x="[cni]\ntimeout = 7"
    )
    assert main(["config", "show", "--config", path]) == 0
    shown = capsys.readouterr().out
    settings = read(path)
    assert tomllib.loads(shown) == settings.tables
    assert f"timeout = 7  # {tmp_path}/conf.d/x.toml\n" in shown
    assert f'[runtimes."a.b"]\npath = "a\\u007f\\"b"  # {path}\n' in shown
    assert '\nroot = "/var/lib/criserver"\n' in "\n" + shown
    assert tomllib.loads(text(read(None))) == read(None).tables


def test_a_wrong_configuration_fails_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "", x="[cni]\ntimeout = 0")
    assert main(["config", "check", "--config", path]) == 1
    assert "conf.d/x.toml: cni.timeout = 0" in capsys.readouterr().err
    (tmp_path / "conf.d" / "x.toml").unlink()
    assert main(["config", "check", "--config", path]) == 0
