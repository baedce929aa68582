"""The errors of the snapshotter."""

from __future__ import annotations

import errno

_SHOWN = 200
# What may be there again later: processes, memory, descriptors. Then space, and a disk that fails now.
_LACKS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_SHORT = (*_LACKS, errno.ENOSPC, errno.EDQUOT, errno.EIO)


class SnapshotError(Exception):
    """A layer or snapshot could not be made, mounted or removed."""


class SnapshotNotFoundError(SnapshotError):
    """No layer or snapshot has that name."""


class HelperKilledError(SnapshotError):
    """A signal has ended the process that unpacks or compares a layer. The same call may succeed later."""


class HelperTimeoutError(SnapshotError):
    """The process that unpacks or compares a layer took too long, or it stood still."""


class LayerError(SnapshotError):
    """The layer's content is broken or hostile; the message names the entry and what is wrong with it."""


class TruncatedLayerError(LayerError):
    """The layer ends in the middle of its content."""


class LimitError(LayerError):
    """The layer is larger than a field of LayerLimits allows; the message names the field."""


class DiffMismatchError(LayerError):
    """The unpacked stream has another digest than the image's configuration says."""


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later: a helper process was killed or hung, or the node lacks something now."""
    if isinstance(error, HelperKilledError | HelperTimeoutError):
        return True
    return any(isinstance(e, OSError) and e.errno in _SHORT for e in (error, error.__cause__))


def is_lack(error: OSError) -> bool:
    """Whether the node lacks something now. Such an error says nothing of the file that it came from."""
    return error.errno in _LACKS


def raise_lack(error: OSError) -> None:
    """Raise the error if the node lacks something now."""
    if is_lack(error):
        raise error


def shown(name: bytes) -> str:
    """An entry's name as a message may carry it: quoted, printable and of bounded length."""
    text = ascii(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def no_thread(error: RuntimeError) -> OSError:
    """The error for a thread that cannot be started. Python itself raises a RuntimeError then.

    EAGAIN, as from pthread_create(3): a limit of processes is reached (TasksMax, a cgroup's or the node's).
    """
    return OSError(errno.EAGAIN, f"{error}; is a limit of processes reached?")
