"""The errors that a caller of CRI can get.

Every error that can reach a gRPC caller is one of these classes. api/ maps ``code`` to the gRPC status of the same
name. The message says what was wrong, with which name, and what to do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class CriError(Exception):
    """Base of all errors that a caller gets. Raised itself for internal faults (INTERNAL)."""

    code: ClassVar[str] = "INTERNAL"


class InvalidArgumentError(CriError):
    """The request itself is wrong. The same call can never succeed."""

    code = "INVALID_ARGUMENT"


class NotFoundError(CriError):
    """The named sandbox, container, image or handler does not exist."""

    code = "NOT_FOUND"


class AlreadyExistsError(CriError):
    """Another sandbox or container has the name."""

    code = "ALREADY_EXISTS"


class FailedPreconditionError(CriError):
    """The request is valid, but the state of the named thing or of the node does not allow it."""

    code = "FAILED_PRECONDITION"


class PermissionDeniedError(CriError):
    """A registry refused the credentials."""

    code = "PERMISSION_DENIED"


class UnauthenticatedError(CriError):
    """A registry requires credentials and got none."""

    code = "UNAUTHENTICATED"


class ResourceExhaustedError(CriError):
    """A limit was reached: disk space, a configured limit, too many of something."""

    code = "RESOURCE_EXHAUSTED"


class NotSupportedError(CriError):
    """The node lacks a program for the call, in the code and with the first words that Kubernetes' tests know."""

    code = "UNKNOWN"


class SignatureError(CriError):
    """A policy refuses an image, in the code and with the first word by which a kubelet knows the reason.

    A kubelet looks for the word at the beginning of the error, which only errors with this code leave as it is.
    """

    code = "UNKNOWN"

    def __init__(self, words: str) -> None:
        super().__init__(f"SignatureValidationFailed: {words}")


class UnavailableError(CriError):
    """Something outside the daemon did not answer (a registry, a plugin). The same call may succeed later."""

    code = "UNAVAILABLE"


class DeadlineExceededError(CriError):
    """The call took longer than the caller or the configuration allows."""

    code = "DEADLINE_EXCEEDED"


class DataLossError(CriError):
    """Content does not match its digest."""

    code = "DATA_LOSS"


class UnimplementedError(CriError):
    """This version does not have the feature that the message names."""

    code = "UNIMPLEMENTED"


def os_words(error: OSError) -> str:
    """The words for a failed system call, without its number: the path, if it is known, and the reason."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def words_of(error: Exception) -> str:
    """The text of an error. That of a failed system call is as :func:`os_words` has it."""
    return os_words(error) if isinstance(error, OSError) else str(error)


@contextmanager
def told_in_words(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a FailedPreconditionError: ``what`` cannot be done, on which path, and why."""
    try:
        yield
    except OSError as e:
        raise FailedPreconditionError(f"{what}: {os_words(e)}") from e


# The resource that the node has run out of, and the limits of it.
_EXHAUSTED = {
    errno.EAGAIN: "no process or thread can be started now: TasksMax of the service, a pids limit or kernel.pid_max",
    errno.ENOMEM: "the node or the service has no memory left",
    errno.EMFILE: "the daemon has no file descriptors left: LimitNOFILE of the service",
    errno.ENFILE: "the node has no file descriptors left: fs.file-max",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
}
_SPACE = (errno.ENOSPC, errno.EDQUOT)
# A disk cannot be read or written, its file system is damaged or has become read-only, or it is gone.
_DISK_FAULTS = (errno.EIO, errno.EUCLEAN, errno.EROFS, errno.ENXIO, errno.ESTALE, errno.EREMOTEIO)


def exhaustion(error: BaseException) -> str:
    """The resource that the node has run out of, if that has caused an error; "" for any other cause.

    A ResourceExhaustedError says itself that a disk is full.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
            told = isinstance(error, ResourceExhaustedError) and cause.errno in _SPACE
            return "" if told else _EXHAUSTED[cause.errno]
    return _EXHAUSTED[errno.ENOMEM] if isinstance(error, MemoryError) else ""


def disk_fault(error: BaseException) -> str:
    """Which path a failing disk or file system has kept from being used, "" for an error of any other cause."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_FAULTS:
            return f"{os_words(cause)}: a disk or its file system has failed; the kernel's log (dmesg) says more"
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes. The chain may have a circle: ``raise e from e`` makes one, also in a library."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__
