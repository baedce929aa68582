"""HTTP_PROXY, HTTPS_PROXY and NO_PROXY."""

from __future__ import annotations

import pytest

from criserver.errors import FailedPreconditionError
from criserver.images.proxies import Proxies

PROXY = "http://proxy.example:3128"


def test_without_an_environment() -> None:
    assert Proxies({}).proxy_for("https", "r.example", 443) is None


@pytest.mark.parametrize(
    ("environment", "scheme", "proxy"),
    [
        ({"HTTPS_PROXY": PROXY}, "https", PROXY),
        ({"https_proxy": PROXY}, "https", PROXY),
        ({"HTTPS_PROXY": PROXY, "https_proxy": "http://other"}, "https", PROXY),
        ({"HTTPS_PROXY": " ", "https_proxy": PROXY}, "https", PROXY),
        ({"HTTPS_PROXY": PROXY}, "http", None),
        ({"HTTP_PROXY": PROXY}, "http", PROXY),
        ({"http_proxy": PROXY}, "https", None),
        ({"ALL_PROXY": PROXY}, "https", None),
        ({"HTTPS_PROXY": "proxy.example:3128"}, "https", PROXY),
        ({"HTTPS_PROXY": "https://me:pass@proxy.example"}, "https", "https://me:pass@proxy.example"),
        ({"HTTPS_PROXY": "socks5://me:pass@proxy.example"}, "https", "socks5://me:pass@proxy.example"),
        ({"HTTP_PROXY": "socks5h://proxy.example:9"}, "http", "socks5h://proxy.example:9"),
        ({"HTTPS_PROXY": "SOCKS5://Me:Pass@proxy.example"}, "https", "socks5://Me:Pass@proxy.example"),
    ],
)
def test_which_variable_counts(environment: dict[str, str], scheme: str, proxy: str | None) -> None:
    assert Proxies(environment).proxy_for(scheme, "r.example", 443) == proxy


@pytest.mark.parametrize(
    "value", ["socks4://me:pass@proxy.example", "socks5://", "http://", "http://[::", "http://x:99999", "ftp://x"]
)
def test_a_proxy_that_is_no_url_is_refused_without_its_password(value: str) -> None:
    with pytest.raises(FailedPreconditionError, match="HTTPS_PROXY") as caught:
        Proxies({"HTTPS_PROXY": value}).proxy_for("https", "r.example", 443)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("user", ["me:p%C3%A9ss", "m\u00e9:pass", f"me:{'p' * 256}", f"{'m' * 256}:pass"])
def test_a_user_that_no_socks_proxy_can_be_told_is_refused(user: str) -> None:
    with pytest.raises(FailedPreconditionError, match=r"HTTPS_PROXY .* at most 255 ASCII characters$") as caught:
        Proxies({"HTTPS_PROXY": f"socks5://{user}@proxy.example"}).proxy_for("https", "r.example", 443)
    assert "\u00e9" not in str(caught.value)
    assert Proxies({"HTTPS_PROXY": f"http://{user}@proxy.example"}).proxy_for("https", "r.example", 443)


@pytest.mark.parametrize(
    ("listed", "host", "direct"),
    [
        ("", "r.example", False),
        ("", "localhost", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("*", "r.example", True),
        ("r.example", "r.example", True),
        ("R.Example", "r.exAMPLE", True),
        ("r.example", "deep.r.example", True),
        ("r.example", "other.example", False),
        ("r.example", "xr.example", False),
        (".example", "r.example", True),
        (".r.example", "r.example", False),
        ("*.example", "r.example", True),
        ("a, r.example ,,b", "r.example", True),
        ("r.example:443", "r.example", True),
        ("r.example:5000", "r.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.1/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "r.example", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:443", "10.1.2.3", True),
        ("10.1.2.3:80", "10.1.2.3", False),
        ("fd00::/8", "fd00::5", True),
        ("[fd00::5]:443", "fd00::5", True),
        ("10.1.2", "10.1.2.3", False),
        (".svc,.cluster.local,10.0.0.0/8", "registry.kube.svc", True),
    ],
)
def test_hosts_without_a_proxy(listed: str, host: str, direct: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        proxies = Proxies({"HTTPS_PROXY": PROXY, name: listed})
        assert proxies.proxy_for("https", host, 443) == (None if direct else PROXY)
