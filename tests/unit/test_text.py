"""Foreign text in messages: printable, bounded, and small enough for a status of gRPC."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.api import grpc_server
from criserver.errors import CriError, InvalidArgumentError
from criserver.text import printable, quoted, shown, status

ANY = st.text(alphabet=st.characters(exclude_categories=()))


@given(ANY)
def test_any_text_becomes_printable_and_can_be_sent(text: str) -> None:
    for found in (printable(text), shown(text), quoted(text), status(text)):
        assert found.isprintable()
        found.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, großer 中文", "plain, großer 中文"),
        ("a\nb\x1b[2J\0", "a\\nb\\x1b[2J\\x00"),
        ("\u202etxt.exe", "\\u202etxt.exe"),  # it would be shown backwards
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_not_to_be_printed_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_what_is_quoted_is_short() -> None:
    assert quoted("n" * 200) == repr("n" * 200)
    assert quoted("n" * 100_000) == repr("n" * 200) + "…"
    assert shown("n" * 100_000) == "n" * 200 + "…"


@given(ANY.map(lambda text: text * 300), st.text(max_size=5000), st.text(max_size=5000))
def test_a_status_fits_into_a_header(middle: str, before: str, after: str) -> None:
    assert server_bytes(status(before + middle + after)) <= 4096


def server_bytes(text: str) -> int:
    """Bytes on the wire, percent-encoded as gRPC says."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


def test_a_status_that_is_too_long_keeps_its_beginning_and_its_end() -> None:
    words = status("what was wrong: " + "ж" * 100_000 + ": what to do")
    assert words.startswith("what was wrong: ж")
    assert words.endswith("ж: what to do")
    assert "…" in words
    assert status("short: 100 %") == "short: 100 %"


class _Failing:
    """A service whose every call fails with ``error``."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def version(self, request: object) -> object:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("x" * 100_000),
        InvalidArgumentError("%" * 100_000),
        InvalidArgumentError("中" * 100_000),
        CriError("\n\0\x1b\ud800" * 10_000),
        ValueError("\udcff" * 10_000),
        ExceptionGroup("both", [InvalidArgumentError("ж" * 100_000)]),
    ],
    ids=["ascii", "percent", "wide", "control", "surrogates", "group"],
)
async def test_a_client_is_told_of_any_error_with_its_own_code(tmp_path: Path, error: Exception) -> None:
    """gRPC's own client, with its own limit of headers: a status beyond that is RESOURCE_EXHAUSTED or UNKNOWN."""
    from criserver.pb.runtime.v1 import api_pb2 as cri

    descriptor = cri.DESCRIPTOR.services_by_name["RuntimeService"]
    missing = {method.name: "nothing" for method in descriptor.methods}
    handler = grpc_server.generic_handler(descriptor, _Failing(error), missing)
    serving = await grpc_server.listen(f"{tmp_path}/s", [handler])
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            call = channel.unary_unary(
                f"/{descriptor.full_name}/Version", cri.VersionRequest.SerializeToString, cri.VersionResponse.FromString
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(cri.VersionRequest())
    finally:
        await serving.stop(None)
    expected = grpc.StatusCode.INVALID_ARGUMENT if "Invalid" in repr(error) else grpc.StatusCode.INTERNAL
    assert caught.value.code() is expected
    assert caught.value.details().isprintable()
