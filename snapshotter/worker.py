"""The unpack worker: the program that unpacks one layer and ends.

Its directory is the layer's staging directory. Its standard input is the blob, which may still be growing. It prints
one JSON object: the counts of what was unpacked, or the class and the text of the error.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from typing import Any

from snapshotter import allocator, confine, errors, mounts, unpacker
from snapshotter.layer_stream import Arriving, LayerStream, decoder
from snapshotter.limits import LayerLimits
from snapshotter.marks import Asker
from snapshotter.tar import TarReader

# Bytes of address space. Unpacking takes a fifth of it, with the largest zstd window a third.
_MAX_MEMORY = 1 << 30
_MAX_FILES = 64

# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP
_CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 27, 31))
_HARMLESS = mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NOEXEC


def main() -> None:
    """Unpack as the first argument, a JSON object, says."""
    options = json.loads(sys.argv[1])
    limits = LayerLimits(**options["limits"])
    allocator.keep_memory()
    blob: Any = sys.stdin.buffer
    if options["told"] is not None:
        blob = Arriving(blob, options["told"])
    try:
        decode = decoder(blob, options["compression"])
        asker = Asker(options["marks"])
        _confine(limits.max_bytes)
        # A worker must not outlive its daemon: the next daemon deletes all in the staging directory.
        confine.die_with(options["daemon"])
        area = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        root = os.open("fs", os.O_RDONLY | os.O_DIRECTORY, dir_fd=area)
        stream = LayerStream(blob, decode, limits)
        reader = TarReader(stream.read, limits)
        made = unpacker.unpack(reader, root, area, asker.set_opaque)
        reader.drain()
        digest = stream.digest()
        if digest != options["diff_id"]:
            raise errors.DiffMismatchError(
                f"the layer's content is {digest} and the image's configuration names {options['diff_id']}"
            )
        result = made._asdict()
    except (errors.SnapshotError, OSError) as e:
        result = {"error": type(e).__name__, "message": str(e)}
        cause = e if isinstance(e, OSError) else e.__cause__
        if isinstance(cause, OSError) and not isinstance(e, errors.LayerError):
            result["errno"] = cause.errno
    except MemoryError:
        result = {"error": "LayerError", "message": f"unpacking it takes more than {_MAX_MEMORY} bytes of memory"}
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()


def _confine(max_bytes: int) -> None:
    """Set resource limits, enter the staging directory by chroot, and keep the capabilities that unpacking takes."""
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _MAX_MEMORY),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
        (resource.RLIMIT_FSIZE, max_bytes),
    ):
        hard = resource.getrlimit(what)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (lower, lower))
    os.umask(0)
    os.setgroups(())
    os.setresgid(0, 0, 0)
    _enter_mount()
    os.chroot(".")
    confine.keep_capabilities(_CAPABILITIES)


def _enter_mount() -> None:
    """Make a mount of this process's directory its directory: it leads nowhere else, and no device opens in it.

    Before Linux 5.12 the directory itself is used.
    """
    own = mounts.open_tree(mounts.AT_FDCWD, ".", mounts.OPEN_TREE_CLONE)
    try:
        mounts.mount_setattr(own, "", mounts.AT_EMPTY_PATH, _HARMLESS)
    except OSError as e:
        if e.errno != errno.ENOSYS:
            raise
        return
    os.fchdir(own)  # never closed: the mount would go with it
