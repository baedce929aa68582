"""The status of a call: gRPC's codes, and the error that a caller gets."""

from __future__ import annotations

from enum import IntEnum


class StatusCode(IntEnum):
    """gRPC's status codes, which ttrpc uses too."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class CallError(Exception):
    """A call that failed.

    ``code`` is the status of the server, or one of these cases:

    1. DEADLINE_EXCEEDED: the answer did not come in time. ``late`` is true then.
    2. UNAVAILABLE: the connection has ended. ``lost`` is true then, and no later call on it can succeed.
    3. RESOURCE_EXHAUSTED: a message is larger than the protocol allows. ``oversized`` is true where nothing was sent.

    A server may send any of these codes itself; none of the three is true then.
    """

    def __init__(
        self, code: StatusCode, message: str, *, late: bool = False, lost: bool = False, oversized: bool = False
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.late = late
        self.lost = lost
        self.oversized = oversized
