"""What a CNI plugin prints: results of ADD, in the versions 0.3.0 to 1.1.0 (CNI specification, section 5).

A plugin's output is checked in full before anything of it is used; what does not fit is a CriError.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from criserver.errors import CriError
from criserver.network.config import VERSIONS


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that the chain made; ``sandbox`` is its network namespace, "" on the host."""

    name: str
    mac: str
    sandbox: str


@dataclass(frozen=True, slots=True)
class Dns:
    """The DNS settings that the network recommends."""

    nameservers: tuple[str, ...]
    domain: str
    search: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A chain's result.

    ``ips`` are the addresses of the pod's own interface without prefix length, the primary one first.
    ``raw`` is the whole document, to be handed to plugins as prevResult.
    """

    interfaces: tuple[Interface, ...]
    ips: tuple[str, ...]
    dns: Dns
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


def parse(document: Mapping[str, Any], *, ifname: str, version: str) -> Result:
    """The result in ``document``, of a network that speaks CNI ``version``.

    An address belongs to the pod if its interface is called ``ifname``, or if it names no interface. Raises
    CriError that names the key.
    """
    said = _string(document, "cniVersion", "") or version
    if said not in VERSIONS:
        raise CriError(f"cniVersion = {excerpt(said)!r} is not supported; supported: {', '.join(VERSIONS)}")
    interfaces = tuple(
        Interface(
            name=_string(item, "name", where),
            mac=_string(item, "mac", where),
            sandbox=_string(item, "sandbox", where),
        )
        for where, item in _objects(document, "interfaces")
    )
    ips = []
    for where, item in _objects(document, "ips"):
        address = _address(item, where)
        index = item.get("interface")
        if index is None or _interface(interfaces, index, where).name == ifname:
            ips.append(address)
    dns = document.get("dns") or {}
    if not isinstance(dns, dict):
        raise CriError("dns is not an object")
    return Result(
        interfaces=interfaces,
        ips=tuple(ips),
        dns=Dns(
            nameservers=_strings(dns, "nameservers", "dns."),
            domain=_string(dns, "domain", "dns."),
            search=_strings(dns, "search", "dns."),
            options=_strings(dns, "options", "dns."),
        ),
        # Plugins refuse a prevResult in another version than their configuration's.
        raw={**document, "cniVersion": version},
    )


def stored(document: Mapping[str, Any], *, ifname: str, version: str) -> Result:
    """The result in ``document``, which an earlier release took; what :func:`parse` refuses is for plugins alone."""
    try:
        return parse(document, ifname=ifname, version=version)
    except CriError:
        return Result((), (), Dns((), "", (), ()), {**document, "cniVersion": version})


def excerpt(text: bytes | str, limit: int = 1000) -> str:
    """The beginning of what a plugin said, fit for a log line and a gRPC status: valid UTF-8, on one line."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    line = " ".join(raw[: limit * 4].decode("utf-8", "replace").split())
    return line if len(line) <= limit else line[:limit] + "…"


def _objects(document: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with the prefix that its keys have in a message; null is an empty list."""
    items = document.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise CriError(f"{key} is not a list of objects")
    return [(f"{key}[{i}].", item) for i, item in enumerate(items)]


def _string(document: Mapping[str, Any], key: str, where: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CriError(f"{where}{key} is not a string")
    return value


def _strings(document: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = document.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CriError(f"{where}{key} is not a list of strings")
    return tuple(value)


def _address(item: Mapping[str, Any], where: str) -> str:
    text = _string(item, "address", where)
    try:
        return str(ipaddress.ip_interface(text).ip)
    except ValueError as e:
        raise CriError(f"{where}address = {excerpt(text)!r} is not an IP address in CIDR notation") from e


def _interface(interfaces: tuple[Interface, ...], index: object, where: str) -> Interface:
    if not isinstance(index, int) or not 0 <= index < len(interfaces):
        raise CriError(f"{where}interface is not an index into the {len(interfaces)} interfaces")
    return interfaces[index]
