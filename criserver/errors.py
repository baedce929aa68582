"""The errors that a caller of CRI can get.

Every error that can reach a gRPC caller is one of these classes. api/ maps ``code`` to the gRPC status of the same
name. The message says what was wrong, with which name, and what to do about it.
"""

from __future__ import annotations

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
