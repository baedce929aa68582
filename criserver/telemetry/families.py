"""The table of all metric families of the daemon.

Names and units follow Prometheus' conventions: base units (seconds, bytes), ``_total`` for counters. No label has the
name of a pod, of a container or of an image: the kubelet serves these, and their number has no limit. The table of
docs/metrics.md is printed by :mod:`criserver.telemetry.metrics_page`.
"""

from __future__ import annotations

from criserver.telemetry.instruments import Counter, Gauge, Histogram, Instrument, Reading

# Upper bounds in seconds.
_CALLS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PULLS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_WRITES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
# A node pulls from few registries and has few plugins. A configuration that has more shows the rest as "other".
_REGISTRIES = {"registry": 20}
_PLUGINS = {"plugin": 20}

BUILD_INFO = Reading("criserver_build_info", "Always 1; the labels say which build runs.", "version", "python_version")

RPCS = Counter("criserver_rpcs_total", "RPCs that have ended, by their gRPC code.", "service", "method", "code")
RPC_DURATION = Histogram(
    "criserver_rpc_duration_seconds", "Time of an RPC; streams are left out.", "service", "method", buckets=_CALLS
)
RPCS_IN_FLIGHT = Gauge("criserver_rpcs_in_flight", "RPCs under way, streams too.", "service", "method")

PULLS = Counter(
    "criserver_image_pulls_total",
    "Pulls that have ended: result is pulled, unchanged (the image was here), failed or cancelled.",
    "registry",
    "result",
    bounded=_REGISTRIES,
)
PULL_DURATION = Histogram(
    "criserver_image_pull_duration_seconds", "Time of a pull.", "registry", buckets=_PULLS, bounded=_REGISTRIES
)
DOWNLOADED = Counter(
    "criserver_image_downloaded_bytes_total",
    "Bytes of blobs that a registry or a mirror has sent.",
    "registry",
    bounded=_REGISTRIES,
)
LAYERS_UNPACKED = Counter("criserver_image_layers_unpacked_total", "Layers that were unpacked.")
IMAGES = Reading("criserver_images", "Images of the node.")
IMAGE_BYTES = Reading("criserver_image_disk_bytes", "Disk space of images: blobs and unpacked layers.")
WRITABLE_BYTES = Reading(
    "criserver_writable_layer_disk_bytes", "Disk space of the containers' writable layers, as last measured."
)

CNI_DURATION = Histogram(
    "criserver_cni_operation_duration_seconds",
    "Time of one call of a CNI plugin, failed calls too.",
    "plugin",
    "verb",
    buckets=_CALLS,
    bounded=_PLUGINS,
)
CNI_FAILURES = Counter(
    "criserver_cni_operation_failures_total", "Calls of a CNI plugin that failed.", "plugin", "verb", bounded=_PLUGINS
)

RUNTIME_DURATION = Histogram(
    "criserver_oci_runtime_call_duration_seconds",
    "Time of one call of an OCI runtime, failed calls too. The time of run has the fork of the shim in it.",
    "handler",
    "verb",
    buckets=_CALLS,
)
RUNTIME_FAILURES = Counter(
    "criserver_oci_runtime_call_failures_total", "Calls of an OCI runtime that failed.", "handler", "verb"
)

SANDBOXES = Reading("criserver_sandboxes", "Pod sandboxes, by the state of their record.", "state")
CONTAINERS = Reading("criserver_containers", "Containers, by the state of their record.", "state")
SHIMS = Reading("criserver_shims", "Shims that the daemon has a connection to.")
SHIMS_LOST = Reading(
    "criserver_shims_lost",
    "Running containers, and infra processes of pods, whose shim the daemon has no connection to.",
)
EXECS = Counter("criserver_execs_total", "Commands that were begun in containers, by Exec or ExecSync.")
EXECS_RUNNING = Gauge("criserver_execs_running", "Commands of Exec and ExecSync that run.")
STREAMS = Reading("criserver_streaming_connections", "Clients of exec, attach and port-forward that are connected.")

DATABASE_DURATION = Histogram(
    "criserver_database_write_duration_seconds", "Time of one transaction, with its second copy.", buckets=_WRITES
)
DATABASE_FAILURES = Counter("criserver_database_write_failures_total", "Transactions that failed.")

RECOVERY = Counter(
    "criserver_recovery_records_total",
    "Records at the daemon's start: found, and of these finished (a removal), rolled_back (a creation), failed.",
    "kind",
    "outcome",
)
RECOVERY_DURATION = Gauge("criserver_recovery_duration_seconds", "Time that the recovery at the daemon's start took.")

LOOP_LAG = Histogram(
    "criserver_event_loop_lag_seconds",
    "By how much a timer of the event loop was late. It is measured twice a second.",
    buckets=_LAGS,
)
TASKS = Reading("criserver_asyncio_tasks", "Tasks of the event loop.")
THREADS = Reading("criserver_threads", "Threads of the daemon's Python.")
LOG_DROPPED = Counter("criserver_log_records_dropped_total", "Records of the daemon's log that could not be written.")

TABLE: tuple[Instrument, ...] = tuple(value for value in globals().values() if isinstance(value, Instrument))
