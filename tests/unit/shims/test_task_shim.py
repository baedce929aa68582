"""How a shim of containerd's kind says at its start where it listens."""

from __future__ import annotations

import pytest

from shims import task_wire
from shims.shim_config import RequestError
from shims.task_shim import bootstrap_result

FOUND = {"version": 3, "address": "unix:///run/s/1"}
RESULT = task_wire.number(1, 3) + task_wire.data(2, "unix:///run/s/1") + task_wire.data(3, "ttrpc")


@pytest.mark.parametrize(
    ("told", "version"),
    [
        (b"unix:///run/s/1", 2),
        (b"unix:///run/s/1\n", 2),
        (b'{"version":2,"address":"unix:///run/s/1","protocol":"ttrpc"}', 2),
        (b'{"version":3,"address":"unix:///run/s/1","protocol":"ttrpc"}\n', 3),
        (RESULT, 3),
    ],
)
def test_each_kind_of_shim_is_understood(told: bytes, version: int) -> None:
    assert bootstrap_result(told) == {"version": version, "address": "unix:///run/s/1"}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (b"", "version 0"),
        (b"[]", "unknown type|cut off"),
        (b"panic: no", "unknown type|cut off"),
        (b'{"version":4,"address":"unix:///a","protocol":"ttrpc"}', "version 4 by ttrpc"),
        (b'{"version":3,"address":"unix:///a","protocol":"grpc"}', "version 3 by grpc"),
        (b'{"version":3,"address":"vsock://3:4","protocol":"ttrpc"}', "vsock"),
        (b'{"version":3,"protocol":"ttrpc"}', "version 3"),
    ],
)
def test_what_is_not_understood_is_told(told: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        bootstrap_result(told)
