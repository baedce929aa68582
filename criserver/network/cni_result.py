"""The output of a CNI plugin: results of ADD, versions 0.3.0 to 1.1.0 (CNI specification, section 5).

The whole output is checked before any part of it is used. Invalid output is a CriError.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from criserver.errors import CriError
from criserver.network.cni_config import VERSIONS


@dataclass(frozen=True, slots=True)
class CniInterface:
    """An interface that the plugins made; ``sandbox`` is its network namespace, "" on the host."""

    name: str
    mac: str
    sandbox: str


@dataclass(frozen=True, slots=True)
class CniDns:
    """The DNS settings that the network recommends."""

    nameservers: tuple[str, ...]
    domain: str
    search: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CniResult:
    """The result of all plugins.

    ``ips`` are the addresses of the pod's own interface without prefix length, the primary one first. ``raw`` is the
    whole document, which plugins get as prevResult.
    """

    interfaces: tuple[CniInterface, ...]
    ips: tuple[str, ...]
    dns: CniDns
    raw: Mapping[str, Any]


def decode(output: bytes) -> dict[str, Any]:
    """The JSON object that a plugin printed. Raises CriError."""
    try:
        document = json.loads(output)
    except (ValueError, RecursionError) as e:
        raise CriError(f"{excerpt(output)!r} is not valid JSON: {e}") from e
    if not isinstance(document, dict):
        raise CriError(f"{excerpt(output)!r} is not a JSON object")
    return document


def parse(document: Mapping[str, Any], *, ifname: str, version: str) -> CniResult:
    """The result in ``document``, of a network with CNI ``version``.

    An address belongs to the pod if its interface is ``ifname``, or if it names no interface. Raises CriError with the
    name of the key.
    """
    result_version = _string(document, "cniVersion", "") or version
    if result_version not in VERSIONS:
        raise CriError(f"cniVersion = {excerpt(result_version)!r} is not supported; supported: {', '.join(VERSIONS)}")
    interfaces = tuple(
        CniInterface(
            name=_string(item, "name", prefix),
            mac=_string(item, "mac", prefix),
            sandbox=_string(item, "sandbox", prefix),
        )
        for prefix, item in _objects(document, "interfaces")
    )
    ips = []
    for prefix, item in _objects(document, "ips"):
        address = _address(item, prefix)
        index = item.get("interface")
        if index is None or _interface(interfaces, index, prefix).name == ifname:
            ips.append(address)
    dns = document.get("dns") or {}
    if not isinstance(dns, dict):
        raise CriError("dns is not an object")
    return CniResult(
        interfaces=interfaces,
        ips=tuple(ips),
        dns=CniDns(
            nameservers=_strings(dns, "nameservers", "dns."),
            domain=_string(dns, "domain", "dns."),
            search=_strings(dns, "search", "dns."),
            options=_strings(dns, "options", "dns."),
        ),
        # Plugins refuse a prevResult whose version differs from their configuration's.
        raw={**document, "cniVersion": version},
    )


def stored(document: Mapping[str, Any], *, ifname: str, version: str) -> CniResult:
    """The result in a recorded ``document``. An earlier release accepted it, so this never raises.

    Where :func:`parse` refuses it, the result has only ``raw``, for the plugins.
    """
    try:
        return parse(document, ifname=ifname, version=version)
    except CriError:
        return CniResult((), (), CniDns((), "", (), ()), {**document, "cniVersion": version})


def excerpt(text: bytes | str, limit: int = 1000) -> str:
    """The beginning of a plugin's text, for a log line or a gRPC status: valid UTF-8, on one line."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    line = " ".join(raw[: limit * 4].decode("utf-8", "replace").split())
    return line if len(line) <= limit else line[:limit] + "…"


def _objects(document: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with the prefix of its keys for messages. null is an empty list."""
    items = document.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise CriError(f"{key} is not a list of objects")
    return [(f"{key}[{i}].", item) for i, item in enumerate(items)]


def _string(document: Mapping[str, Any], key: str, prefix: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CriError(f"{prefix}{key} is not a string")
    return value


def _strings(document: Mapping[str, Any], key: str, prefix: str) -> tuple[str, ...]:
    value = document.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CriError(f"{prefix}{key} is not a list of strings")
    return tuple(value)


def _address(item: Mapping[str, Any], prefix: str) -> str:
    text = _string(item, "address", prefix)
    try:
        return str(ipaddress.ip_interface(text).ip)
    except ValueError as e:
        raise CriError(f"{prefix}address = {excerpt(text)!r} is not an IP address in CIDR notation") from e


def _interface(interfaces: tuple[CniInterface, ...], index: object, prefix: str) -> CniInterface:
    if not isinstance(index, int) or not 0 <= index < len(interfaces):
        raise CriError(f"{prefix}interface is not an index into the {len(interfaces)} interfaces")
    return interfaces[index]
