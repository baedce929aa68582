"""Reading and checking the configuration file."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from criserver.errors import InvalidArgumentError

_ADVICE = "`criserver config default` prints every key with its default"


@dataclass(frozen=True, slots=True)
class RuntimeHandler:
    """A runtime handler: an OCI runtime program, by absolute path or by a name on PATH."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Streaming:
    """The address of the streaming server. It uses TLS if both files are named."""

    host: str
    port: int
    tls_cert: str
    tls_key: str
    idle_timeout: float


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for an image and each of its layers."""

    max_layers: int
    max_entries: int
    max_bytes: int
    max_ratio: int
    ratio_floor: int


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. default.toml explains each field. Times are in seconds."""

    root: str
    state: str
    grpc_address: str
    containerd_address: str
    log_level: str
    log_format: str
    metrics_address: str
    cni_bin_dirs: tuple[str, ...]
    cni_conf_dir: str
    cni_timeout: float
    registry_config_path: str
    registry_auth_file: str
    registry_max_downloads: int
    registry_progress_timeout: float
    images: ImageLimits
    default_runtime: str
    cgroup_driver: str
    infra: str
    cdi_dirs: tuple[str, ...]
    streaming: Streaming
    runtimes: Mapping[str, RuntimeHandler] = field(default_factory=dict)


def default_text() -> str:
    """The commented default configuration, as ``criserver config default`` prints it."""
    return files("criserver.config").joinpath("default.toml").read_text()


def load(path: str | None) -> Config:
    """The defaults, overridden by the file ``path``; the defaults alone for None.

    Raises :class:`InvalidArgumentError`, which names the file, the key, its value and the allowed values.
    """
    merged: dict[str, Any] = tomllib.loads(default_text())
    if path is not None:
        given = _read(path)
        _check(path, given)
        _merge(merged, given)
    cni, registry, runtime = merged["cni"], merged["registry"], merged["runtime"]
    runtimes = {name: RuntimeHandler(name, table["path"]) for name, table in merged["runtimes"].items()}
    if runtime["default"] not in runtimes:
        raise InvalidArgumentError(
            f"{path}: [runtime] default = {runtime['default']!r} has no table [runtimes.{runtime['default']}]; "
            f"there are: {', '.join(sorted(runtimes))}"
        )
    return Config(
        root=os.path.normpath(merged["root"]),
        state=os.path.normpath(merged["state"]),
        grpc_address=merged["grpc"]["address"],
        containerd_address=merged["grpc"]["containerd_address"],
        log_level=merged["log"]["level"],
        log_format=merged["log"]["format"],
        metrics_address=_metrics_address(path, merged["metrics"]["address"]),
        cni_bin_dirs=tuple(cni["bin_dirs"]),
        cni_conf_dir=cni["conf_dir"],
        cni_timeout=float(cni["timeout"]),
        registry_config_path=registry["config_path"],
        registry_auth_file=registry["auth_file"],
        registry_max_downloads=registry["max_downloads"],
        registry_progress_timeout=float(registry["progress_timeout"]),
        images=ImageLimits(**merged["images"]),
        default_runtime=runtime["default"],
        cgroup_driver=runtime["cgroup_driver"],
        infra=runtime["infra"],
        cdi_dirs=tuple(merged["cdi"]["dirs"]),
        streaming=_streaming(path, merged["streaming"]),
        runtimes=runtimes,
    )


def _metrics_address(path: str | None, address: str) -> str:
    """The address as it is. The endpoint asks nobody who they are, so no other node may reach it."""
    if not address or address.startswith("unix://"):
        return address
    host, _, port = address.rpartition(":")
    if int(port) >= 1 << 16:
        raise InvalidArgumentError(f"configuration {path}: metrics.address = {address!r}: {port} is not a port")
    if host != "localhost" and not _is_loopback(host.strip("[]")):
        raise InvalidArgumentError(
            f"configuration {path}: metrics.address = {address!r}: {host} is not a loopback address; the metrics have "
            "no authentication, so put a proxy such as kube-rbac-proxy before 127.0.0.1"
        )
    return address


def _is_loopback(host: str) -> bool:
    # Imported here: most nodes have no metrics, and save its memory.
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _streaming(path: str | None, table: Mapping[str, Any]) -> Streaming:
    host, _, port = table["address"].rpartition(":")
    if int(port) >= 1 << 16:
        raise InvalidArgumentError(
            f"configuration {path}: streaming.address = {table['address']!r}: {port} is not a port"
        )
    if bool(table["tls_cert"]) != bool(table["tls_key"]):
        raise InvalidArgumentError(
            f"configuration {path}: give both streaming.tls_cert and streaming.tls_key, or neither"
        )
    return Streaming(host.strip("[]"), int(port), table["tls_cert"], table["tls_key"], float(table["idle_timeout"]))


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except OSError as e:
        raise InvalidArgumentError(f"configuration {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidArgumentError(f"configuration {path} is not valid TOML: {e}") from e


def _check(path: str, given: dict[str, Any]) -> None:
    # Imported here: a daemon without a configuration file saves its memory.
    import jsonschema

    schema = json.loads(files("criserver.config").joinpath("schema.json").read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(given):
        raise InvalidArgumentError(f"configuration {path}: {_explain(schema, error)}; {_ADVICE}")


def _explain(schema: dict[str, Any], error: Any) -> str:
    """A sentence with the key, its value and the allowed values, for the most common mistakes."""
    keys = [str(k) for k in error.absolute_path]
    where = ".".join(keys) or "the top level"
    match error.validator:
        case "additionalProperties":
            allowed = sorted(error.schema.get("properties", {}))
            unknown = ", ".join(sorted(set(error.instance) - set(allowed)))
            return f"unknown key {unknown} at {where}; allowed: {', '.join(allowed)}"
        case "required":
            return f"{where}: {error.message}"
        case "enum":
            return f"{where} = {error.instance!r}; allowed: {', '.join(error.validator_value)}"
        case "type":
            return f"{where} = {error.instance!r}; it must be of type {error.validator_value}"
        case "pattern" if error.validator_value == schema["$defs"]["path"]["pattern"]:
            return f"{where} = {error.instance!r}; it must be an absolute path"
        case "pattern" if error.validator_value == schema["$defs"]["path_or_none"]["pattern"]:
            return f"{where} = {error.instance!r}; it must be an absolute path, or empty"
        case "pattern" if where == "metrics.address":
            return f"{where} = {error.instance!r}; it must be HOST:PORT, unix:///PATH, or empty"
        case "pattern" if where == "streaming.address":
            return f"{where} = {error.instance!r}; it must be HOST:PORT, with an IPv6 address in brackets"
        case _:
            return f"{where} = {error.instance!r}: {error.message}"


def _merge(base: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if key == "runtimes":
            base[key] = value  # handlers of the file replace the default one, so a file can leave runc out
        elif isinstance(value, dict):
            _merge(base[key], value)
        else:
            base[key] = value
