"""The certs.d directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError
from criserver.images.hosts import RegistryHost, hosts_for

ALL = frozenset({"pull", "resolve", "push", "referrers"})


Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(directory: str, text: str) -> str:
        os.makedirs(tmp_path / directory, exist_ok=True)
        (tmp_path / directory / "hosts.toml").write_text(text)
        return str(tmp_path)

    return write


def urls(hosts: tuple[RegistryHost, ...]) -> list[str]:
    return [host.url + host.path for host in hosts]


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("docker.io", ["https://registry-1.docker.io/v2"]),
        ("example.com:5000", ["https://example.com:5000/v2"]),
        ("127.0.0.1:5000", ["https://127.0.0.1:5000/v2", "http://127.0.0.1:5000/v2"]),
        ("127.1.2.3:5000", ["https://127.1.2.3:5000/v2", "http://127.1.2.3:5000/v2"]),
        ("[::1]:5000", ["https://[::1]:5000/v2", "http://[::1]:5000/v2"]),
        ("localhost:80", ["http://localhost:80/v2"]),
        ("localhost", ["https://localhost/v2"]),
        ("localhost:443", ["https://localhost:443/v2"]),
    ],
)
def test_without_configuration(domain: str, expected: list[str], tmp_path: Path) -> None:
    hosts = hosts_for(domain, "")
    assert urls(hosts) == expected
    assert hosts == hosts_for(domain, str(tmp_path))
    assert hosts == hosts_for(domain, str(tmp_path / "missing"))
    assert all(host.origin and not host.namespace and host.capabilities == ALL for host in hosts)


def test_mirrors_in_file_order_then_the_server(write: Write) -> None:
    path = write(
        "docker.io",
        """
        server = "https://registry-1.docker.io"
        [host."https://z.example"]
        capabilities = ["pull"]
        [host."http://a.example:5000/deep/path"]
        [host."http://a.example:5000/deep/path".header]
        X-One = "1"
        X-Two = ["2", "3"]
        [host."m.example/v2/own"]
        override_path = true
        """,
    )
    hosts = hosts_for("docker.io", path)
    assert urls(hosts) == [
        "https://z.example/v2",
        "http://a.example:5000/deep/path/v2",
        "https://m.example/v2/own",
        "https://registry-1.docker.io/v2",
    ]
    assert [host.namespace for host in hosts] == ["docker.io", "docker.io", "docker.io", ""]
    assert [host.origin for host in hosts] == [False, False, False, True]
    assert hosts[0].capabilities == {"pull"}
    assert hosts[1].headers == (("X-One", "1"), ("X-Two", "2"), ("X-Two", "3"))


@pytest.mark.parametrize("server", ["https://docker.io", "https://index.docker.io/", "docker.io/v2"])
def test_docker_hubs_own_names_mean_its_registry(write: Write, server: str) -> None:
    path = write("docker.io", f'server = "{server}"\n[host."https://docker.io"]')
    assert [(host.url, host.path, host.origin, host.namespace) for host in hosts_for("docker.io", path)] == [
        ("https://registry-1.docker.io", "/v2", True, "")
    ] * 2


def test_a_server_elsewhere_is_the_registry_under_another_name(write: Write) -> None:
    hosts = hosts_for("example.com", write("example.com", 'server = "https://inside.example"'))
    assert (hosts[0].url, hosts[0].namespace, hosts[0].origin) == ("https://inside.example", "example.com", True)


def test_without_a_server_the_registry_itself_is_last_and_has_the_keys_of_the_top(write: Write) -> None:
    path = write("example.com", 'ca = "ca.pem"\nskip_verify = true\n[host."https://m.example"]\nskip_verify = false')
    mirror, own = hosts_for("example.com", path)
    assert (own.url, own.ca, own.skip_verify) == ("https://example.com", (f"{path}/example.com/ca.pem",), True)
    assert (mirror.url, mirror.ca, mirror.skip_verify) == ("https://m.example", (), False)


def test_paths_of_certificates(write: Write) -> None:
    path = write(
        "r.example",
        """
        server = "https://r.example"
        ca = ["/abs/ca.pem", "own.pem"]
        client = [["c.cert", "c.key"], ["both.pem", ""], "single.pem"]
        """,
    )
    (host,) = hosts_for("r.example", path)
    here = f"{path}/r.example"
    assert host.ca == ("/abs/ca.pem", f"{here}/own.pem")
    assert host.client == (
        (f"{here}/c.cert", f"{here}/c.key"),
        (f"{here}/both.pem", None),
        (f"{here}/single.pem", None),
    )


def test_tls_keys_at_an_http_address_mean_https_first(write: Write) -> None:
    path = write("r.example", 'server = "http://10.0.0.1:5000"\nskip_verify = true')
    hosts = hosts_for("r.example", path)
    assert urls(hosts) == ["https://10.0.0.1:5000/v2", "http://10.0.0.1:5000/v2"]
    assert [host.fallback for host in hosts] == [False, True]
    path = write("r.example", 'server = "http://10.0.0.1:80"\nskip_verify = true')
    assert urls(hosts_for("r.example", path)) == ["http://10.0.0.1:80/v2"]


def test_directory_names(write: Write) -> None:
    path = write("_default", 'server = "https://default.example"')
    assert urls(hosts_for("r.example:5000", path)) == ["https://default.example/v2"]
    write("r.example:5000", 'server = "https://colon.example"')
    assert urls(hosts_for("r.example:5000", path)) == ["https://colon.example/v2"]
    write("r.example_5000_", 'server = "https://underscore.example"')
    assert urls(hosts_for("r.example:5000", path)) == ["https://underscore.example/v2"]
    assert urls(hosts_for("r.example", path)) == ["https://default.example/v2"]


def test_of_several_directories_the_first_that_knows_a_registry_counts(write: Write, tmp_path: Path) -> None:
    write("one/r.example", 'server = "https://one.example"')
    write("two/r.example", 'server = "https://two.example"')
    write("two/_default", 'server = "https://default.example"')
    path = f"{tmp_path}/none:{tmp_path}/one:{tmp_path}/two"
    assert urls(hosts_for("r.example", path)) == ["https://one.example/v2"]
    assert urls(hosts_for("other.example", path)) == ["https://default.example/v2"]


def test_certificate_files_in_place_of_hosts_toml(tmp_path: Path) -> None:
    directory = tmp_path / "r.example"
    directory.mkdir()
    for name in ("a.crt", "b.crt", "c.cert", "c.key", "d.cert", "notes"):
        (directory / name).touch()
    (host,) = hosts_for("r.example", str(tmp_path))
    assert host.url == "https://r.example"
    assert host.ca == (f"{directory}/a.crt", f"{directory}/b.crt")
    assert host.client == ((f"{directory}/c.cert", f"{directory}/c.key"), (f"{directory}/d.cert", None))


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400)])
def test_dial_timeout(write: Write, text: str, seconds: float | int) -> None:
    (host,) = hosts_for("r.example", write("r.example", f'dial_timeout = "{text}"'))
    assert host.dial_timeout == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("server = ", "not TOML"),
        ("server = 1", "key server:"),
        ('server = "ftp://x"', "key server: 'ftp://x'"),
        ('server = "https://user@x"', "key server:"),
        ('server = "https://x:99999"', "key server:"),
        ('server = "https://x?y"', "key server:"),
        ('server = "https://[::1"', "key server:"),
        ('server = "https://[1:2]:5000"', "key server:"),
        ('server = "https://a b"', "key server:"),
        ("host = 1", "key host:"),
        ('[host]\n"https://x" = 1', 'key host."https://x":'),
        ('[host."https://x"]\ncapabilities = ["fly"]', "key host.\"https://x\".capabilities: 'fly'"),
        ('[host."https://x"]\ncapabilities = "pull"', "capabilities: is not a list"),
        ('[host."https://x"]\nca = 1', 'host."https://x".ca:'),
        ('[host."https://x"]\nclient = [["a", "b", "c"]]', 'host."https://x".client:'),
        ('[host."https://x"]\nskip_verify = "yes"', "skip_verify: is neither"),
        ('[host."https://x"]\noverride_path = 1', "override_path: is neither"),
        ('[host."https://x"]\ndial_timeout = "soon"', "dial_timeout: 'soon'"),
        ('[host."https://x".header]\nA = 1', "header.A:"),
        ('[host."https://x".header]\nA = "b\\r\\nc"', "header.A: has a line break"),
    ],
)
def test_a_malformed_file_is_named_with_its_key(write: Write, text: str, key: str) -> None:
    path = write("r.example", text)
    with pytest.raises(FailedPreconditionError) as caught:
        hosts_for("r.example", path)
    assert str(caught.value).startswith(f"{path}/r.example/hosts.toml")
    assert key in str(caught.value)


def test_unknown_keys_are_passed_over(write: Write) -> None:
    assert urls(hosts_for("r.example", write("r.example", "from_the_future = 1"))) == ["https://r.example/v2"]


def test_a_file_out_of_all_proportion(write: Write) -> None:
    with pytest.raises(FailedPreconditionError, match="larger than"):
        hosts_for("r.example", write("r.example", "#" * (2 << 20)))
