"""The CNI configuration directory: which file is used, what is refused, and that changes are noticed."""

from __future__ import annotations

import builtins
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import FailedPreconditionError
from criserver.network.cni_config import CniConfigDirectory, NetworkConfig

BRIDGE = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local", "subnet": "10.1.0.0/16"}}


def conflist(**changes: Any) -> str:
    document = {"cniVersion": "1.0.0", "name": "podnet", "plugins": [BRIDGE], **changes}
    return json.dumps({key: value for key, value in document.items() if value is not None})


def load(directory: Path) -> NetworkConfig:
    return CniConfigDirectory(str(directory)).current()


def refusal(directory: Path) -> str:
    with pytest.raises(FailedPreconditionError) as e:
        load(directory)
    return str(e.value)


def test_a_list_is_taken_as_the_file_has_it(tmp_path: Path) -> None:
    (tmp_path / "10-pod.conflist").write_text(conflist(plugins=[BRIDGE, {"type": "portmap", "own key": [1]}]))
    config = load(tmp_path)
    assert config == NetworkConfig(
        name="podnet",
        cni_version="1.0.0",
        plugins=(BRIDGE, {"type": "portmap", "own key": [1]}),
        disable_check=False,
        source=str(tmp_path / "10-pod.conflist"),
    )


@pytest.mark.parametrize("name", ["pod.conflist", "pod.conf"])
def test_null_is_a_key_that_is_not_there(tmp_path: Path, name: str) -> None:
    """As for programs in Go, which write these files."""
    plugin = {**BRIDGE, "capabilities": None, "dns": {"domain": None, "search": ["a.example"]}, "own key": None}
    document = {"cniVersion": "1.0.0", "name": "podnet", "disableCheck": None, "cniVersions": None}
    written = {**document, "plugins": [plugin]} if name == "pod.conflist" else {**document, **plugin}
    (tmp_path / name).write_text(json.dumps(written))
    (found,) = load(tmp_path).plugins
    assert (found.get("capabilities", {}), found["dns"], found["own key"]) == ({}, {"search": ["a.example"]}, None)


def test_a_single_plugin_becomes_a_list_of_one(tmp_path: Path) -> None:
    single = {"cniVersion": "0.4.0", "name": "one", **BRIDGE}
    (tmp_path / "10-one.conf").write_text(json.dumps(single))
    config = load(tmp_path)
    assert (config.name, config.cni_version, config.plugins) == ("one", "0.4.0", (single,))


def test_the_first_name_rules_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "20.conflist").write_text(conflist(name="second"))
    (tmp_path / "10.json").write_text(json.dumps({"cniVersion": "0.4.0", "name": "first", **BRIDGE}))
    (tmp_path / "00.conflist.bak").write_text(conflist(name="no-configuration"))
    assert load(tmp_path).name == "first"


def test_a_file_that_cannot_be_read_for_a_moment_is_not_passed_over(tmp_path: Path) -> None:
    """Pods would go to another network until a file changes."""
    (tmp_path / "10-first.conflist").write_text(conflist(name="first"))
    (tmp_path / "99-second.conflist").write_text(conflist(name="second"))
    directory = CniConfigDirectory(str(tmp_path))
    real = builtins.open

    def failing(path: Any, *arguments: Any, **more: Any) -> Any:
        if str(path).endswith("10-first.conflist"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", failing)
        with pytest.raises(FailedPreconditionError, match="Too many open files"):
            directory.current()
    assert directory.current().name == "first"


def test_an_invalid_file_is_passed_over_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").write_text("{")
    (tmp_path / "20.conflist").write_text(conflist(name="second"))
    assert load(tmp_path).name == "second"


def test_without_a_file_the_message_says_what_to_do(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        message = refusal(directory)
        assert message.startswith(f"no CNI configuration in {directory}: install a network plugin")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        (conflist(name=None), "'name' is a required property"),
        (conflist(name="../etc"), "key name: "),
        (conflist(name=7), "key name: 7 is not of type 'string'"),
        (conflist(plugins=[]), "key plugins: "),
        (conflist(plugins=None), "key plugins: there is none"),
        (conflist(plugins=[{}]), "key plugins.0: 'type' is a required property"),
        (conflist(plugins=[BRIDGE, {"type": "../bin/sh"}]), "key plugins.1.type: "),
        (conflist(plugins=[BRIDGE | {"capabilities": {"dns": "yes"}}]), "key plugins.0.capabilities.dns: "),
        (conflist(cniVersion="0.5.0"), "key cniVersion: 0.5.0 is not supported; it must be one of 0.3.0, "),
        (conflist(cniVersion="1"), "key cniVersion: '1' does not match"),
        (conflist(cniVersion="2.0.0", cniVersions=["3.0.0"]), "key cniVersion: 2.0.0, 3.0.0 is not supported"),
        (conflist(disableCheck="perhaps"), "key disableCheck: "),
    ],
)
def test_faults_are_told_by_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "10.conflist"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(tmp_path)
    assert message.startswith(f"no valid CNI configuration in {tmp_path}: {path}: ")
    assert expected in message


def test_a_list_in_a_file_for_one_plugin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "10.conf").write_text(conflist())
    assert "10.conf: key plugins: a list of plugins must be in a file that ends in .conflist" in refusal(tmp_path)


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_every_supported_version_is_taken(tmp_path: Path, version: str) -> None:
    (tmp_path / "10.conflist").write_text(conflist(cniVersion=version))
    config = load(tmp_path)
    assert config.cni_version == version
    assert config.has_version("0.4.0") is (version not in ("0.3.0", "0.3.1"))


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", None])
def test_a_file_from_before_lists_is_one_of_the_first_version_with_them(tmp_path: Path, version: str | None) -> None:
    """As in the example that CNI's own README had for years, and in files without a version."""
    document = {"cniVersion": version, "name": "mynet", "type": "bridge"}
    (tmp_path / "10-mynet.conf").write_text(json.dumps({key: value for key, value in document.items() if value}))
    assert load(tmp_path).cni_version == "0.3.1"


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [
        ("0.4.0", ["1.0.0", "0.3.1"], "1.0.0"),
        ("1.0.0", ["0.3.1", "0.4.0"], "1.0.0"),
        (None, ["0.4.0", "1.1.0"], "1.1.0"),
        ("2.0.0", ["0.4.0", "1.0.0", "2.0.0"], "1.0.0"),
    ],
)
def test_the_highest_common_version_is_chosen(
    tmp_path: Path, version: str | None, versions: list[str], expected: str
) -> None:
    (tmp_path / "10.conflist").write_text(conflist(cniVersion=version, cniVersions=versions))
    assert load(tmp_path).cni_version == expected


@pytest.mark.parametrize(("value", "expected"), [(True, True), ("True", True), (False, False), ("false", False)])
def test_disable_check(tmp_path: Path, value: bool | str, expected: bool) -> None:
    (tmp_path / "10.conflist").write_text(conflist(disableCheck=value))
    assert load(tmp_path).disable_check is expected


def test_plugins_of_the_sibling_folder_are_appended_unless_forbidden(tmp_path: Path) -> None:
    (tmp_path / "podnet").mkdir()
    (tmp_path / "podnet" / "20.conf").write_text('{"type": "tuning"}')
    (tmp_path / "podnet" / "10.conf").write_text('{"type": "firewall"}')
    (tmp_path / "10.conflist").write_text(conflist())
    assert [p["type"] for p in load(tmp_path).plugins] == ["bridge", "firewall", "tuning"]
    (tmp_path / "10.conflist").write_text(conflist(loadOnlyInlinedPlugins=True))
    assert [p["type"] for p in load(tmp_path).plugins] == ["bridge"]
    (tmp_path / "10.conflist").write_text(conflist(plugins=None))
    assert [p["type"] for p in load(tmp_path).plugins] == ["firewall", "tuning"]
    (tmp_path / "podnet" / "10.conf").write_text("{}")
    assert "podnet/10.conf: key top level: 'type' is a required property" in refusal(tmp_path)


def test_every_change_is_followed(tmp_path: Path) -> None:
    directory = CniConfigDirectory(str(tmp_path / "net.d"))
    with pytest.raises(FailedPreconditionError, match="no CNI configuration"):
        directory.current()
    (tmp_path / "net.d" / "podnet").mkdir(parents=True)
    late = tmp_path / "net.d" / "20.conflist"
    late.write_text(conflist())
    first = directory.current()
    assert directory.current() is first, "an unchanged directory is not read again"

    late.write_text(conflist(disableCheck=True))
    assert directory.current().disable_check

    (tmp_path / "net.d" / "podnet" / "10.conf").write_text('{"type": "tuning"}')
    assert len(directory.current().plugins) == 2

    early = tmp_path / "net.d" / "10.conflist"
    early.write_text(conflist(name="early"))
    assert directory.current().name == "early"

    replacement = tmp_path / "new"
    replacement.write_text(conflist(name="other"))
    os.rename(replacement, early)
    assert directory.current().name == "other"

    early.unlink()
    late.unlink()
    with pytest.raises(FailedPreconditionError, match="no CNI configuration"):
        directory.current()


def test_a_dangling_link_is_a_fault_of_that_file_only(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").symlink_to(tmp_path / "absent")
    assert "10.conflist: cannot be read: No such file" in refusal(tmp_path)
    (tmp_path / "20.conflist").write_text(conflist())
    assert load(tmp_path).name == "podnet"


def test_a_file_in_the_directorys_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "net.d").write_text("")
    assert f"cannot read the CNI configuration in {tmp_path / 'net.d'}" in refusal(tmp_path / "net.d")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("name", "cniVersion", "cniVersions", "plugins", "disableCheck", "loadOnlyInlinedPlugins", "type")


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_document_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("conf")
    (directory / "10.conflist").write_text(json.dumps({**json.loads(conflist()), **document}))
    try:
        assert load(directory).plugins
    except FailedPreconditionError as e:
        assert "10.conflist: key " in str(e)
