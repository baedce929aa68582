"""What contrib/deb/build.py puts into the Debian package beside the libraries."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from criserver import cli, own_directories
from criserver.cli.options import configuration
from criserver.config import load

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deb_build", ROOT / "contrib/deb/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deb_build"] = module
    # The program finds the modules beside it, as Python puts its directory on the path.
    sys.path.insert(0, str(ROOT / "contrib/deb"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "contrib/deb"))
    return module


def older(one: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=False).returncode == 0


def test_versions_are_in_the_order_of_debian(build: ModuleType) -> None:
    first = build.parse(["--python", "3.11", "--architecture", "amd64"]).version
    newer_python = build.parse(["--python", "3.13", "--architecture", "amd64"]).version
    second = build.parse(["--python", "3.11", "--revision", "2", "--architecture", "amd64"]).version
    assert older(first, newer_python), "a node that goes to the next Debian gets the other package"
    assert older(newer_python, second)


@pytest.mark.parametrize(
    ("given", "expected"), [("1.2.0", "1.2.0"), ("1.2.0rc1", "1.2.0~rc1"), ("1.2.0.dev3", "1.2.0~dev3")]
)
def test_what_comes_before_a_release_sorts_before_it(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, expected: str
) -> None:
    (tmp_path / "criserver").mkdir()
    (tmp_path / "criserver/__init__.py").write_text(f'"""..."""\n\n__version__ = "{given}"\n')
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    assert build.upstream_version() == expected
    assert expected == "1.2.0" or older(expected, "1.2.0")


@pytest.mark.parametrize("words", [["--python", "2.7"], ["--python", "3"], ["--revision", "x1"], ["--revision", "1-2"]])
def test_options_that_no_package_can_have_are_refused(build: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        build.parse(words)


def test_the_configuration_names_every_key_and_sets_one(build: ModuleType, tmp_path: Path) -> None:
    text = build.configuration()
    keys = re.findall(r"^#?(\w+) = ", text, re.MULTILINE)
    assert keys == re.findall(r"^(\w+) = ", (ROOT / "criserver/config/default.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^\w.*", text, re.MULTILINE) == ['cgroup_driver = "systemd"']
    # Each key can be had by taking its "#" away; those of a handler with the lines that make the handler.
    handler = text.splitlines().index("#[runtimes.runc]")
    for number, line in enumerate(text.splitlines()):
        if re.match(r"#\w+ = ", line):
            lines = [
                other[1:] if number > handler and other.startswith(("#[runtimes.runc]", "#path = ")) else other
                for other in text.splitlines()
            ]
            lines[number] = line[1:]
            (tmp_path / "config.toml").write_text("\n".join(lines))
            load(str(tmp_path / "config.toml"))


def test_a_file_of_the_service_that_has_no_place_is_not_left_out_in_silence(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(build.PLACES, "systemd", {".timer": "usr/lib/systemd/system/{name}"})
    options = build.parse(["--architecture", "amd64"])
    with pytest.raises(SystemExit, match=r"no place is known for contrib/systemd/criserver\.service"):
        build.files(options, tmp_path)


def test_links_lead_to_files_of_the_package(build: ModuleType, tmp_path: Path) -> None:
    build.files(build.parse(["--architecture", "amd64"]), tmp_path)
    # The libraries' licences are added to this file later.
    (tmp_path / build.DOC / "copyright").touch()
    pages = sorted((tmp_path / build.DOC).rglob("*.md"))
    assert {page.name for page in pages} > {path.name for path in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        ours = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
        assert [link for link in ours if not (page.parent / link).is_file()] == [], page.name
    readme = (tmp_path / build.DOC / "README.md").read_text()
    assert "[Installing](install.md)" in readme
    assert "[changelog](changelog.gz)" in readme
    assert "program in bench/. [" in readme, "a link to a file that is not in the package is its text"
    service = (tmp_path / "usr/lib/systemd/system/criserver.service").read_text()
    (named,) = re.findall(r"^Documentation=file:/(.+)$", service, re.MULTILINE)
    assert (tmp_path / named).is_file()


def test_the_manual_page_of_the_configuration_has_every_key(build: ModuleType, tmp_path: Path) -> None:
    defaults = (ROOT / "criserver/config/default.toml").read_text()
    page = tmp_path / "criserver.toml.5"
    page.write_text(build.pages.manual_page(defaults))
    found = re.findall(r'^\.BR ([^ ]+) " = ', page.read_text(), re.MULTILINE)
    assert [name.rpartition(".")[2] for name in found] == re.findall(r"^(\w+) = ", defaults, re.MULTILINE)
    assert "nri.default_validator.enable" in found
    assert ".SS [runtimes.runc]\nOne table for each runtime handler." in page.read_text()
    # Each line that begins with a dot is a request that roff knows.
    assert set(re.findall(r"^\.(\w*)", page.read_text(), re.MULTILINE)) == set("TH SH SS TP BR IR I PP nf fi".split())


def test_the_manual_page_has_every_command_and_option() -> None:
    page = (ROOT / "contrib/deb/criserver.8").read_text().replace("\\-", "-")

    def walk(parser: argparse.ArgumentParser, path: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    walk(child, f"{path} {name}")
            elif action.dest != "help" and action.option_strings:
                assert action.option_strings[-1] in page
        if not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions):
            assert f".B {path}" in page

    walk(cli.parser(), "criserver")


def test_the_manual_pages_have_each_section_once(build: ModuleType) -> None:
    page = (ROOT / "contrib/deb/criserver.8").read_text()
    for text in (page, build.pages.manual_page('[log]\n# Text.\nlevel = "info"\n')):
        sections = re.findall(r"^\.SH (.*)", text, re.MULTILINE)
        assert len(sections) == len(set(sections))
        assert "EXAMPLES" in sections
    codes = page.partition(".SH EXIT STATUS\n")[2].partition(".SH")[0]
    assert re.findall(r"^\.B (\d+)$", codes, re.MULTILINE) == ["0", "1", "2", "3", "130"]


def test_the_package_needs_what_the_default_configuration_runs() -> None:
    (fields,) = re.findall(r"^Depends: (.*)$", (ROOT / "contrib/deb/control.in").read_text(), re.MULTILINE)
    # containerd.io is Docker's package, with a runc in it.
    runtimes = {"runc": {"runc", "containerd.io"}}
    config = load(None)
    needed = [{name.split()[0] for name in field.split("|")} for field in fields.split(",")]
    for program in (config.runtimes[config.default_runtime].path, Path(config.infra).name):
        assert runtimes.get(program, {program}) in needed


def test_the_crates_of_a_wheel_are_in_the_copyright_file(build: ModuleType, tmp_path: Path) -> None:
    assert build._crates(tmp_path) == ""
    crates = [
        {"name": "one", "version": "1.2", "licenses": [{"expression": "MIT"}], "author": "A Name"},
        {"name": "two", "version": "3.4", "licenses": [{"expression": "MIT OR Apache-2.0"}]},
    ]
    (tmp_path / "sboms").mkdir()
    (tmp_path / "sboms/x.cyclonedx.json").write_text(json.dumps({"components": crates}))
    assert build._crates(tmp_path).splitlines()[1:] == [" one 1.2: MIT, by A Name", " two 3.4: MIT OR Apache-2.0"]


def test_all_commands_go_by_the_nodes_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def levels() -> set[str]:
        words = ("check", "reset", "image list", "serve", "config show", "config check")
        return {configuration(cli.parser().parse_args(command.split())).log_level for command in words}

    monkeypatch.setattr("criserver.cli.options.NODES_CONFIG", str(tmp_path / "config.toml"))
    assert levels() == {"info"}
    (tmp_path / "config.toml").write_text('[log]\nlevel = "error"')
    assert levels() == {"error"}


def test_the_removal_deletes_the_names_that_the_daemon_makes() -> None:
    script = (ROOT / "contrib/deb/postrm.in").read_text().replace("\\\n", " ")
    found = {line.split()[2]: set(line.split()[3:]) for line in script.splitlines() if line.startswith("\tclear /")}
    assert found == {
        own_directories.ROOT.marker: set(own_directories.ROOT.names),
        own_directories.STATE.marker: {*own_directories.STATE.names, "criserver.sock"},
    }
