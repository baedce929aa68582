"""CNI results in the form of every version. Any other output of a plugin is a CriError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import CriError
from criserver.network.cni_result import CniDns, CniInterface, CniResult, decode, excerpt, parse

NETNS = "/run/criserver/ns/net"
BRIDGE_RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "cni0", "mac": "26:22:a9:d7:5e:1b"},
        {"name": "veth5a6d", "mac": "fe:3b:70:0b:4f:11"},
        {"name": "eth0", "mac": "72:4f:5a:e1:2f:01", "sandbox": NETNS},
    ],
    "ips": [
        {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2},
        {"address": "fd00:1::5/64", "interface": 2},
    ],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {"nameservers": ["10.1.0.1"], "domain": "local", "search": ["a", "b"], "options": ["ndots:5"]},
}


def parsed(document: dict[str, Any], *, version: str = "1.0.0") -> CniResult:
    return parse(document, ifname="eth0", version=version)


def test_all_fields() -> None:
    result = parsed(BRIDGE_RESULT)
    assert result.interfaces[0] == CniInterface("cni0", "26:22:a9:d7:5e:1b", "")
    assert result.interfaces[2] == CniInterface("eth0", "72:4f:5a:e1:2f:01", NETNS)
    assert result.ips == ("10.1.0.5", "fd00:1::5")
    assert result.dns == CniDns(("10.1.0.1",), "local", ("a", "b"), ("ndots:5",))
    assert result.raw == BRIDGE_RESULT


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_the_older_form_with_an_ip_version(version: str) -> None:
    document = {"cniVersion": version, "ips": [{"version": "4", "address": "10.1.0.5/16"}], "dns": {}}
    assert parsed(document, version=version).ips == ("10.1.0.5",)


def test_addresses_keep_their_order() -> None:
    document = {"ips": [{"address": "fd00::5/64"}, {"address": "10.0.0.2/8"}, {"address": "10.0.0.1/8"}]}
    assert parsed(document).ips == ("fd00::5", "10.0.0.2", "10.0.0.1")


def test_only_the_pods_own_interface_counts() -> None:
    document = {
        "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": NETNS}, {"name": "net1", "sandbox": NETNS}],
        "ips": [
            {"address": "10.1.0.1/16", "interface": 0},
            {"address": "10.2.0.9/16", "interface": 2},
            {"address": "10.1.0.5/16", "interface": 1},
        ],
    }
    assert parsed(document).ips == ("10.1.0.5",)


def test_prev_result_is_in_the_configurations_version() -> None:
    assert parsed({"ips": []}, version="0.4.0").raw == {"cniVersion": "0.4.0", "ips": []}
    assert parsed({"cniVersion": "1.1.0"}, version="1.0.0").raw["cniVersion"] == "1.0.0"


def test_null_is_nothing() -> None:
    result = parsed({"interfaces": None, "ips": None, "dns": None, "cniVersion": None})
    assert (result.interfaces, result.ips, result.dns) == ((), (), CniDns((), "", (), ()))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.2/8"}}, "cniVersion = '0.2.0' is not supported"),
        ({"cniVersion": 1}, "cniVersion is not a string"),
        ({"ips": {}, "interfaces": "eth0"}, "interfaces is not a list of objects"),
        ({"interfaces": [None]}, "interfaces is not a list of objects"),
        ({"interfaces": [{}, {"name": 3}]}, "interfaces[1].name is not a string"),
        ({"ips": [{"address": "10.0.0.256/8"}]}, "ips[0].address = '10.0.0.256/8' is not an IP address"),
        ({"ips": [{"address": 167772162}]}, "ips[0].address is not a string"),
        ({"ips": [{}]}, "ips[0].address = '' is not an IP address"),
        ({"ips": [{"address": "10.0.0.1/8", "interface": 0}]}, "ips[0].interface is not an index into the 0"),
        ({"ips": [{"address": "10.0.0.1/8", "interface": "0"}]}, "ips[0].interface is not an index"),
        ({"interfaces": [{}], "ips": [{"address": "10.0.0.1/8", "interface": -1}]}, "ips[0].interface is not"),
        ({"dns": [1]}, "dns is not an object"),
        ({"dns": {"search": "cluster.local"}}, "dns.search is not a list of strings"),
        ({"dns": {"domain": ["x"]}}, "dns.domain is not a string"),
    ],
)
def test_faults_name_the_key(document: dict[str, Any], message: str) -> None:
    with pytest.raises(CriError) as e:
        parsed(document)
    assert message in str(e.value)


@pytest.mark.parametrize("output", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 200_000, b"9" * 10_000])
def test_what_is_no_object_is_refused(output: bytes) -> None:
    with pytest.raises(CriError) as e:
        decode(output)
    assert len(str(e.value)) < 2000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = st.sampled_from(
    ("cniVersion", "interfaces", "ips", "dns", "name", "mac", "sandbox", "address", "interface", "search", "domain")
)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS | st.sampled_from(("1.0.0", "eth0", "10.0.0.1/8", "fe80::1%eth0/64")),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
)


@given(DOCUMENTS)
def test_any_document_is_a_result_or_a_cri_error(document: dict[str, Any]) -> None:
    try:
        result = parsed(document)
    except CriError as e:
        str(e).encode()
    else:
        assert all(isinstance(ip, str) for ip in result.ips)
        assert parse(json.loads(json.dumps(result.raw)), ifname="eth0", version="1.0.0").ips == result.ips


@given(st.binary() | st.text().map(lambda text: json.dumps(text).encode()))
def test_any_output_is_an_object_or_a_cri_error(output: bytes) -> None:
    try:
        assert isinstance(decode(output), dict)
    except CriError as e:
        str(e).encode()


@given(st.binary() | st.text(alphabet=st.characters(exclude_categories=())), st.integers(1, 50))
def test_an_excerpt_is_one_short_line_of_valid_text(text: bytes | str, limit: int) -> None:
    line = excerpt(text, limit)
    line.encode()
    assert len(line) <= limit + 1
    assert "\n" not in line
