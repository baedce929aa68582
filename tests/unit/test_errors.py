"""What the node has run out of, as a caller is told."""

from __future__ import annotations

import errno
import os

import pytest

from criserver.errors import (
    CriError,
    FailedPreconditionError,
    ResourceExhaustedError,
    disk_fault,
    exhaustion,
    os_words,
    told_in_words,
)


def caused(error: Exception, *causes: BaseException) -> Exception:
    """The error, raised from the first of the causes, that from the second, and so on."""
    for outer, inner in zip((error, *causes), causes, strict=False):
        outer.__cause__ = inner
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EAGAIN, ""), "no process or thread"),
        (caused(CriError("x"), OSError(errno.EMFILE, "")), "LimitNOFILE"),
        (caused(FailedPreconditionError("x"), ValueError(), OSError(errno.ENFILE, "")), "fs.file-max"),
        (MemoryError(), "no memory"),
        (OSError(errno.ENOSPC, ""), "disk is full"),
        (caused(CriError("x"), OSError(errno.EDQUOT, "")), "quota"),
        (caused(FailedPreconditionError("x"), OSError(errno.ENOSPC, "")), "disk is full"),
        # It says it itself.
        (caused(ResourceExhaustedError("x"), OSError(errno.ENOSPC, "")), ""),
        (OSError(errno.ENOENT, ""), ""),
        (caused(CriError("x"), OSError(errno.EACCES, "")), ""),
        (CriError("x"), ""),
    ],
)
def test_what_has_run_out_is_found_behind_any_error(error: Exception, words: str) -> None:
    assert words in exhaustion(error)
    assert bool(words) == bool(exhaustion(error))


@pytest.mark.timeout(10)
def test_a_circle_of_causes_has_an_end() -> None:
    error = caused(CriError("x"), ValueError())
    for cause in (error, error.__cause__):
        assert cause is not None
        cause.__cause__ = error
    assert exhaustion(error) == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/disk/f"), "/disk/f: Input/output error: a disk"),
        (caused(CriError("x"), OSError(errno.EROFS, "Read-only file system", "/disk")), "/disk: Read-only"),
        (caused(FailedPreconditionError("x"), ValueError(), OSError(errno.EIO, "Input/output error")), "Input/output"),
        (OSError(errno.ENOENT, "", "/disk/f"), ""),
        (CriError("x"), ""),
    ],
)
def test_a_failing_disk_is_told_with_its_path(error: Exception, words: str) -> None:
    assert disk_fault(error).startswith(words)
    assert bool(words) == bool(disk_fault(error))


def test_an_error_of_the_system_is_told_without_its_number() -> None:
    assert os_words(OSError(errno.ENOENT, "No such file or directory", "/f")) == "/f: No such file or directory"
    assert os_words(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert os_words(TimeoutError()) == "TimeoutError"
    found = pytest.raises(FailedPreconditionError, match=r"^it failed: /nowhere/f: No such file or directory$")
    with found, told_in_words("it failed"):
        os.stat("/nowhere/f")
