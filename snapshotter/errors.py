"""The errors of the snapshotter."""

from __future__ import annotations

import errno

_SHOWN = 200


class SnapshotError(Exception):
    """A layer or snapshot could not be made, mounted or removed."""


class SnapshotNotFoundError(SnapshotError):
    """No layer or snapshot has that name."""


class UnpackKilledError(SnapshotError):
    """A signal has ended the process that unpacks a layer. The same call may succeed later."""


class UnpackTimeoutError(SnapshotError):
    """The process that unpacks a layer took too long, or it stood still."""


class LayerError(SnapshotError):
    """The layer's content is broken or hostile; the message names the entry and what is wrong with it."""


class TruncatedLayerError(LayerError):
    """The layer ends in the middle of its content."""


class LimitError(LayerError):
    """The layer is larger than a field of LayerLimits allows; the message names the field."""


class DiffMismatchError(LayerError):
    """The unpacked stream has another digest than the image's configuration says."""


def shown(name: bytes) -> str:
    """An entry's name as a message may carry it: quoted, printable and of bounded length."""
    text = ascii(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def no_thread(error: RuntimeError) -> OSError:
    """What a thread that cannot be started means, which Python tells by a RuntimeError.

    EAGAIN, as from pthread_create(3): a limit of processes is reached (TasksMax, a cgroup's or the node's).
    """
    return OSError(errno.EAGAIN, f"{error}; is a limit of processes reached?")
