"""The configuration: defaults, and errors that name the key, the value and what is allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from criserver.cli import main
from criserver.config import default_text, load
from criserver.config.load import ImageLimits, RuntimeHandler
from criserver.errors import InvalidArgumentError
from snapshotter import LayerLimits


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def test_the_printed_default_is_what_serve_uses_without_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "default"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["root"] == "/var/lib/criserver"
    assert load(written(tmp_path, printed)) == load(None)


def test_every_key_of_the_default_is_explained() -> None:
    lines = default_text().splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#") and not line.startswith("path"):
            assert lines[number - 1].startswith("#"), line


def test_a_file_needs_only_what_differs(tmp_path: Path) -> None:
    config = load(
        written(
            tmp_path, '[grpc]\naddress = "/run/other.sock"\n[runtimes.crun]\npath = "crun"\n[runtime]\ndefault = "crun"'
        )
    )
    assert config.grpc_address == "/run/other.sock"
    assert list(config.runtimes) == ["crun"]
    assert config.cni_conf_dir == "/etc/cni/net.d"


def test_a_handler_has_the_defaults_of_the_keys_that_its_table_lacks(tmp_path: Path) -> None:
    handler = load(written(tmp_path, '[runtimes.runc]\npath = "runc"')).runtimes["runc"]
    assert handler == load(None).runtimes["runc"] == RuntimeHandler("runc", "runc")
    text = '[runtimes.runc]\npath = "/runsc"\nargs = ["--platform=kvm"]\nsandbox = "container"'
    handler = load(written(tmp_path, text)).runtimes["runc"]
    assert (handler.args, handler.sandbox_container) == (("--platform=kvm",), True)


def test_the_registry_table(tmp_path: Path) -> None:
    config = load(written(tmp_path, '[registry]\nauth_file = "/a.json"\nmax_downloads = 3\nprogress_timeout = 9'))
    assert config.registry_config_path == "/etc/containerd/certs.d:/etc/docker/certs.d"
    assert config.registry_auth_file == "/a.json"
    assert (config.registry_max_downloads, config.registry_progress_timeout) == (3, 9.0)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9095", "localhost:0", "[::1]:80", "127.9.9.9:1", "unix:///run/m.sock", ""]
)
def test_addresses_for_metrics(tmp_path: Path, address: str) -> None:
    assert load(written(tmp_path, f'[metrics]\naddress = "{address}"')).metrics_address == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0:9095", "not a loopback address"),
        ("[::]:9095", "not a loopback address"),
        ("node1:9095", "not a loopback address"),
        ("127.0.0.1:99999", "99999 is not a port"),
        ("127.0.0.1", "it must be HOST:PORT, unix:///PATH, or empty"),
        ("unix://run/m.sock", "it must be HOST:PORT, unix:///PATH, or empty"),
    ],
)
def test_addresses_for_metrics_that_are_refused(tmp_path: Path, address: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"metrics.address = .*{words}"):
        load(written(tmp_path, f'[metrics]\naddress = "{address}"'))


def test_root_and_state_are_real_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "ahead").symlink_to("real/not-there-yet")
    config = load(written(tmp_path, f'root = "{tmp_path}/link/root/"\nstate = "{tmp_path}/ahead/../link/state"'))
    assert (config.root, config.state) == (f"{tmp_path}/real/root", f"{tmp_path}/real/state")
    config = load(written(tmp_path, f'state = "{tmp_path}/ahead"'))
    assert config.state == f"{tmp_path}/real/not-there-yet"


def test_the_limits_of_images_are_the_snapshotters_own_where_nothing_is_said(tmp_path: Path) -> None:
    assert load(None).images == ImageLimits(*(getattr(LayerLimits(), name) for name in ImageLimits.__slots__))
    config = load(written(tmp_path, "[images]\nmax_layers = 3\nmax_bytes = 5\nmax_seconds = 7.5"))
    images = config.images
    assert (images.max_layers, images.max_bytes, images.max_ratio, images.max_seconds) == (3, 5, 200, 7.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('rot = "/x"', ["unknown key rot", "allowed:", "root"]),
        ("[cni]\nconf_dir = 12", ["cni.conf_dir = 12", "string"]),
        ('state = "run"', ["state = 'run'", "absolute path"]),
        ('[log]\nlevel = "loud"', ["log.level = 'loud'", "debug, info, warning, error"]),
        ("[cni]\ntimeout = 0", ["cni.timeout = 0"]),
        ('[runtime]\ndefault = "kata"', ["'kata'", "[runtimes.kata]", "runc"]),
        ("[runtimes.runc]", ["runtimes.runc has neither path", "nor shim"]),
        ('[runtimes."Not A Name"]\npath = "x"', ["Not A Name"]),
        ('[registry]\nauth_file = "config.json"', ["registry.auth_file = 'config.json'", "absolute path, or empty"]),
        ("[registry]\nmax_downloads = 0", ["registry.max_downloads = 0"]),
        ("[registry]\nmax_downloads = 1.5", ["registry.max_downloads = 1.5", "integer"]),
        ("[registry]\nprogress_timeout = 0", ["registry.progress_timeout = 0"]),
        ("[images]\nmax_layers = 501", ["images.max_layers = 501"]),
        ("[images]\nmax_entries = 0", ["images.max_entries = 0"]),
        ("[images]\nmax_bytes = 9223372036854775808", ["images.max_bytes = 9223372036854775808"]),
        ("[images]\nmax_ratio = 1.5", ["images.max_ratio = 1.5", "integer"]),
        ("[images]\nmax_seconds = 0.5", ["images.max_seconds = 0.5"]),
        ("[images]\nmax_seconds = 604801", ["images.max_seconds = 604801"]),
        ('[runtimes.a]\npath = "a"\nshim = "/a"', ["runtimes.a has shim, and path", "give one"]),
        ('[runtimes.a]\npath = ""', ["runtimes.a has neither path", "nor shim"]),
        ('[runtimes.a]\nshim = ""', ["runtimes.a has neither path", "nor shim"]),
        ('[runtimes.a]\nshim = "kata"', ["runtimes.a.shim = 'kata'"]),
        ('[runtimes.a]\npath = "a"\n[runtimes.a.options]\nX = 1', ["runtimes.a: options are for a shim"]),
        ('[runtimes.a]\nshim = "/a"\nargs = ["x"]', ["runtimes.a: args are for an OCI runtime"]),
        ('[runtimes.a]\npath = "a"\nsandbox = "vm"', ["runtimes.a.sandbox = 'vm'", "namespaces, container"]),
        ('[runtimes.a]\npath = "a"\nroot = "a"', ["runtimes.a.root = 'a'", "absolute path, or empty"]),
        ('[runtimes.a]\npath = "a"\npod_annotations = [""]', ["runtimes.a.pod_annotations.0 = ''"]),
        ('[runtimes.a]\npath = "a"\nrunc = 1', ["unknown key runc at runtimes.a", "cni_conf_dir"]),
        ("root = ", ["not valid TOML"]),
    ],
)
def test_a_mistake_is_told_by_key_value_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgumentError) as e:
        load(path)
    for word in [path, *words]:
        assert word in str(e.value)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "/nowhere/criserver.toml"]) == 1
    assert "/nowhere/criserver.toml: No such file" in capsys.readouterr().err


def test_tracing_is_off_and_its_endpoint_and_rate_have_a_form(tmp_path: Path) -> None:
    assert (load(None).tracing_endpoint, load(None).tracing_rate) == ("", 0)
    found = load(written(tmp_path, '[tracing]\nendpoint = "[::1]:4317"\nsampling_rate_per_million = 1000000'))
    assert (found.tracing_endpoint, found.tracing_rate) == ("[::1]:4317", 1_000_000)
    for line, words in (
        ('endpoint = "http://127.0.0.1:4317"', "tracing.endpoint = .*HOST:PORT without a scheme"),
        ('endpoint = "127.0.0.1"', "tracing.endpoint = .*HOST:PORT"),
        ("sampling_rate_per_million = 1000001", "tracing.sampling_rate_per_million = 1000001"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            load(written(tmp_path, f"[tracing]\n{line}"))


def test_a_drop_in_makes_a_handler_of_another_file_a_shim(tmp_path: Path) -> None:
    main = written(tmp_path, '[runtimes.runc]\npath = "runc"')
    drop_in = tmp_path / "conf.d/10-shim.toml"
    drop_in.parent.mkdir()
    drop_in.write_text('[runtimes.runc]\nshim = "io.containerd.runc.v2"')
    with pytest.raises(InvalidArgumentError) as e:
        load(main)
    for words in (f"{drop_in}: runtimes.runc has shim, and path", f"from {main}", '`path = ""` removes the path'):
        assert words in str(e.value)
    drop_in.write_text('[runtimes.runc]\npath = ""\nshim = "io.containerd.runc.v2"')
    found = load(main).runtimes["runc"]
    assert (found.path, found.shim) == ("", "io.containerd.runc.v2")
