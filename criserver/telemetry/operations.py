"""The table of all operations that are timed: the parts of a call. docs/tracing.md lists them."""

from __future__ import annotations

from criserver.telemetry import families
from criserver.telemetry.spans import Operation

# Waiting.
EARLIER_ATTEMPT = Operation("earlier attempt")
LOCK = Operation("lock", "record", of_one=("record",))
RECOVERY = Operation("recovery")

# Pods.
CNI = Operation("CNI", "plugin", "verb", duration=families.CNI_DURATION, failures=families.CNI_FAILURES)
NAMESPACES = Operation("namespaces")
POD_FILES = Operation("pod files")

# Containers.
BUNDLE = Operation("bundle")
CLEAN_UP = Operation("clean-up by the shim")
DELETE = Operation("delete files")
KILL = Operation("SIGKILL")
MOUNT = Operation("mount")
RUNTIME = Operation("OCI", "handler", "verb", duration=families.RUNTIME_DURATION, failures=families.RUNTIME_FAILURES)
SHIM = Operation("shim")
SNAPSHOT = Operation("snapshot")
STOP = Operation("stop signal", "signal")
UNMOUNT = Operation("unmount")

# Plugins of the Node Resource Interface.
NRI = Operation("NRI", "plugin", "method")

# The database. A transaction is made by its thread, and a write is what a call waits for.
TRANSACTION = Operation("transaction", duration=families.DATABASE_DURATION, failures=families.DATABASE_FAILURES)
WRITE = Operation("database write")

# Images.
DOWNLOAD = Operation("download", "blob", of_one=("blob",))
PULL = Operation("pull", "registry", duration=families.PULL_DURATION)
RESOLVE = Operation("resolve")
UNPACK = Operation("unpack", "layer", of_one=("layer",))

TABLE: tuple[Operation, ...] = tuple(value for value in globals().values() if isinstance(value, Operation))
