"""The status of a call that has failed."""

from __future__ import annotations

import errno
import os

import grpc
import pytest

from criserver.api.grpc_server import _status
from criserver.errors import CriError, FailedPreconditionError


def failed(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (failed(errno.EIO, "/disk/f"), "INTERNAL", "Call: /disk/f: Input/output error: a disk or its file system has"),
        (caused(CriError("no layer"), failed(errno.EROFS, "/d")), "INTERNAL", "Call: no layer (/d: Read-only file"),
        (caused(FailedPreconditionError("no log"), failed(errno.EIO)), "FAILED_PRECONDITION", "Call: no log (Input/"),
        (failed(errno.ENOSPC, "/disk/f"), "RESOURCE_EXHAUSTED", "Call: /disk/f: No space left on device (the disk"),
        (failed(errno.EACCES, "/disk/f"), "INTERNAL", "Call: PermissionError: /disk/f: Permission denied"),
        (CriError("no such luck"), "INTERNAL", "no such luck"),
        (KeyError("x"), "INTERNAL", "Call: KeyError: 'x'"),
    ],
)
def test_an_error_is_told_by_its_code_and_in_words(error: Exception, code: str, text: str) -> None:
    found, message = _status("Call", error)
    assert found is grpc.StatusCode[code]
    assert message.startswith(text)
