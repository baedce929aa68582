"""The configuration as the daemon uses it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from criserver.config import system_directories
from criserver.config.pod_defaults import PodDefaults, pod_defaults
from criserver.config.settings import Settings, read
from criserver.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class RuntimeHandler:
    """A runtime handler. default.toml explains each field; ``path`` is absolute or a name on PATH."""

    name: str
    path: str = ""
    shim: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    root: str = ""
    sandbox: str = "namespaces"
    pod_annotations: tuple[str, ...] = ()
    container_annotations: tuple[str, ...] = ("*", "*/*")
    privileged_without_host_devices: bool = False
    cni_conf_dir: str = ""
    cgroup_writable: bool = False
    base_runtime_spec: str = ""

    @property
    def sandbox_container(self) -> bool:
        """Whether a pod is a sandbox container, which the pod's containers join."""
        return self.sandbox == "container"


@dataclass(frozen=True, slots=True)
class Streaming:
    """The address of the streaming server. It uses TLS if ``tls_cert`` and ``tls_key`` are named."""

    host: str
    port: int
    tls_cert: str
    tls_key: str
    tls_ca: str
    idle_timeout: float


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for an image and each of its layers."""

    max_layers: int
    max_entries: int
    max_bytes: int
    max_ratio: int
    ratio_floor: int
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Nri:
    """The plugins of the Node Resource Interface. ``default_validator`` has its keys as they are in the file."""

    disable: bool
    socket_path: str
    plugin_path: str
    plugin_config_path: str
    plugin_registration_timeout: float
    plugin_request_timeout: float
    disable_connections: bool
    default_validator: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. default.toml explains each field. Times are in seconds.

    ``root`` and ``state`` are real paths.
    """

    root: str
    state: str
    grpc_address: str
    containerd_address: str
    max_recv_message_size: int
    max_send_message_size: int
    log_level: str
    log_format: str
    metrics_address: str
    tracing_endpoint: str
    tracing_rate: int
    cni_bin_dirs: tuple[str, ...]
    cni_conf_dir: str
    cni_timeout: float
    netns_dir: str
    registry_config_path: str
    registry_auth_file: str
    registry_max_downloads: int
    registry_progress_timeout: float
    images: ImageLimits
    pinned_images: tuple[str, ...]
    default_runtime: str
    cgroup_driver: str
    infra: str
    enable_unprivileged_ports: bool
    enable_unprivileged_icmp: bool
    max_container_log_line_size: int
    ctr_stop_timeout: float
    pod_defaults: PodDefaults
    cdi_dirs: tuple[str, ...]
    streaming: Streaming
    nri: Nri
    runtimes: Mapping[str, RuntimeHandler] = field(default_factory=dict)


def load(path: str | None, *, optional: bool = False) -> Config:
    """The configuration of a file and its drop-ins; see :func:`criserver.config.settings.read`."""
    return config_of(read(path, optional=optional))


def config_of(settings: Settings) -> Config:
    """The values of all keys. Raises :class:`InvalidArgumentError` for values that do not fit together."""
    tables = settings.tables
    cni, registry, runtime = tables["cni"], tables["registry"], tables["runtime"]
    runtimes = {name: _handler(settings, name, table) for name, table in tables["runtimes"].items()}
    root, state = os.path.normpath(tables["root"]), os.path.normpath(tables["state"])
    if fault := system_directories.fault(root, state):
        key, words = fault
        raise InvalidArgumentError(f"configuration {settings.origin(key)}: {words}")
    if runtime["default"] not in runtimes:
        raise InvalidArgumentError(
            f"configuration {settings.origin('runtime', 'default')}: [runtime] default = {runtime['default']!r} has no "
            f"table [runtimes.{runtime['default']}]; there are: {', '.join(sorted(runtimes))}"
        )
    return Config(
        # The kernel lists mounts by their real paths, and runc takes no root file system behind a symbolic link.
        root=os.path.realpath(root),
        state=os.path.realpath(state),
        grpc_address=tables["grpc"]["address"],
        containerd_address=tables["grpc"]["containerd_address"],
        max_recv_message_size=tables["grpc"]["max_recv_message_size"],
        max_send_message_size=tables["grpc"]["max_send_message_size"],
        log_level=tables["log"]["level"],
        log_format=tables["log"]["format"],
        metrics_address=_metrics_address(settings),
        tracing_endpoint=tables["tracing"]["endpoint"],
        tracing_rate=tables["tracing"]["sampling_rate_per_million"],
        cni_bin_dirs=tuple(cni["bin_dirs"]),
        cni_conf_dir=cni["conf_dir"],
        cni_timeout=float(cni["timeout"]),
        netns_dir=cni["netns_dir"],
        registry_config_path=registry["config_path"],
        registry_auth_file=registry["auth_file"],
        registry_max_downloads=registry["max_downloads"],
        registry_progress_timeout=float(registry["progress_timeout"]),
        images=ImageLimits(**{key: value for key, value in tables["images"].items() if key != "pinned"}),
        pinned_images=tuple(tables["images"]["pinned"]),
        default_runtime=runtime["default"],
        cgroup_driver=runtime["cgroup_driver"],
        infra=runtime["infra"],
        enable_unprivileged_ports=runtime["enable_unprivileged_ports"],
        enable_unprivileged_icmp=runtime["enable_unprivileged_icmp"],
        max_container_log_line_size=runtime["max_container_log_line_size"],
        ctr_stop_timeout=float(runtime["ctr_stop_timeout"]),
        pod_defaults=pod_defaults(settings),
        cdi_dirs=tuple(tables["cdi"]["dirs"]),
        streaming=_streaming(settings),
        nri=Nri(**tables["nri"]),
        runtimes=runtimes,
    )


def _metrics_address(settings: Settings) -> str:
    """The address, unchanged. The endpoint has no authentication, so other nodes must not reach it."""
    address = str(settings.tables["metrics"]["address"])
    if not address or address.startswith("unix://"):
        return address
    host, _, port = address.rpartition(":")
    where = f"configuration {settings.origin('metrics', 'address')}: metrics.address = {address!r}"
    if int(port) >= 1 << 16:
        raise InvalidArgumentError(f"{where}: {port} is not a port")
    if host != "localhost" and not _is_loopback(host.strip("[]")):
        raise InvalidArgumentError(
            f"{where}: {host} is not a loopback address; the metrics have no authentication, so put a proxy such as "
            "kube-rbac-proxy before 127.0.0.1"
        )
    return address


def _is_loopback(host: str) -> bool:
    # Imported here: most nodes have no metrics, and save its memory.
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _handler(settings: Settings, name: str, table: Mapping[str, Any]) -> RuntimeHandler:
    """A handler of its table, which need not have every key."""
    files = {file: None for key, file in settings.origins.items() if key[:2] == ("runtimes", name)}
    what = f"configuration {', '.join(files)}: runtimes.{name}"
    if table.get("path") and table.get("shim"):
        given_in = settings.origin("runtimes", name, "path")
        raise InvalidArgumentError(
            f"{what} has shim, and path, for an OCI runtime, from {given_in}; give one. "
            'Beside shim, `path = ""` removes the path of another file'
        )
    if table.get("options") and not table.get("shim"):
        raise InvalidArgumentError(f"{what}: options are for a shim; an OCI runtime has args")
    if table.get("args") and table.get("shim"):
        raise InvalidArgumentError(f"{what}: args are for an OCI runtime; a shim has options")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return RuntimeHandler(name=name, **given)


def _streaming(settings: Settings) -> Streaming:
    table = settings.tables["streaming"]
    host, _, port = table["address"].rpartition(":")
    if int(port) >= 1 << 16:
        raise InvalidArgumentError(
            f"configuration {settings.origin('streaming', 'address')}: streaming.address = {table['address']!r}: "
            f"{port} is not a port"
        )
    if bool(table["tls_cert"]) != bool(table["tls_key"]):
        given = "tls_cert" if table["tls_cert"] else "tls_key"
        raise InvalidArgumentError(
            f"configuration {settings.origin('streaming', given)}: give both streaming.tls_cert and "
            "streaming.tls_key, or neither"
        )
    if table["tls_ca"] and not table["tls_cert"]:
        raise InvalidArgumentError(
            f"configuration {settings.origin('streaming', 'tls_ca')}: streaming.tls_ca needs streaming.tls_cert and "
            "streaming.tls_key too"
        )
    return Streaming(
        host=host.strip("[]"),
        port=int(port),
        tls_cert=table["tls_cert"],
        tls_key=table["tls_key"],
        tls_ca=table["tls_ca"],
        idle_timeout=float(table["idle_timeout"]),
    )
