"""What can go wrong, in the terms a caller of CRI acts on.

Every error that may reach a gRPC caller is one of these classes; api/ maps ``code`` to the gRPC status
of the same name. The message says what was wrong, with which name, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class CriError(Exception):
    """Base of all errors that a caller is told of; raised as such for faults of our own (INTERNAL)."""

    code: ClassVar[str] = "INTERNAL"


class InvalidArgumentError(CriError):
    """The request itself is wrong; the same call can never succeed."""

    code = "INVALID_ARGUMENT"


class NotFoundError(CriError):
    """The sandbox, container, image or handler that was named does not exist."""

    code = "NOT_FOUND"


class AlreadyExistsError(CriError):
    """The name is taken by another sandbox or container."""

    code = "ALREADY_EXISTS"


class FailedPreconditionError(CriError):
    """The request is sound, but the thing it names, or the node, is not in a state that allows it."""

    code = "FAILED_PRECONDITION"


class PermissionDeniedError(CriError):
    """A registry refused the credentials that it was given."""

    code = "PERMISSION_DENIED"


class UnauthenticatedError(CriError):
    """A registry wants credentials and got none."""

    code = "UNAUTHENTICATED"


class ResourceExhaustedError(CriError):
    """A bound was reached: disk space, a configured limit, too many of something."""

    code = "RESOURCE_EXHAUSTED"


class UnavailableError(CriError):
    """Something outside did not answer (a registry, a plugin); the same call may succeed later."""

    code = "UNAVAILABLE"


class DeadlineExceededError(CriError):
    """The time that the caller or the configuration allows was used up."""

    code = "DEADLINE_EXCEEDED"


class DataLossError(CriError):
    """Content does not match its digest."""

    code = "DATA_LOSS"


class UnimplementedError(CriError):
    """A feature that this version does not have; the message names it."""

    code = "UNIMPLEMENTED"
