"""What the node has run out of, as a caller is told."""

from __future__ import annotations

import errno

import pytest

from criserver.errors import CriError, FailedPreconditionError, ResourceExhaustedError, exhaustion


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
        # These say it themselves.
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
