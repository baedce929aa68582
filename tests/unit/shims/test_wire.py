"""The protocol of the shims: the result is the same for any chunks, and other bytes are refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shims
from shims.wire import MAX_FDS, MAX_FRAME, Channel, Frames, ProtocolError, encode

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=40)
MESSAGES = st.dictionaries(st.text(max_size=10), SCALARS | st.lists(SCALARS, max_size=4), max_size=5)


def _chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(0, 400), max_size=12))
def test_any_chunking_decodes_the_same(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    frames = Frames()
    decoded = [message for chunk in _chunks(b"".join(map(encode, messages)), cuts) for message in frames.feed(chunk)]
    assert decoded == messages


@given(MESSAGES)
def test_a_body_is_json_as_any_library_has_it(message: dict[str, Any]) -> None:
    frame = encode(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert json.loads(frame[4:]) == message
    for text in (json.dumps(message, indent=2), json.dumps(message, ensure_ascii=False) + "\n"):
        body = text.encode("utf-8")
        assert Frames().feed(len(body).to_bytes(4, "big") + body) == [message]


def test_byte_by_byte() -> None:
    frames = Frames()
    decoded = [message for byte in encode({"op": "status", "re": 7}) for message in frames.feed(bytes([byte]))]
    assert decoded == [{"op": "status", "re": 7}]


@given(st.integers(MAX_FRAME + 1, 2**32 - 1))
def test_a_length_over_the_maximum_is_refused_before_its_body(size: int) -> None:
    with pytest.raises(ProtocolError, match=str(size)):
        Frames().feed(size.to_bytes(4, "big"))


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    room = MAX_FRAME - len(json.dumps({"k": ""}, separators=(",", ":")))
    message = {"k": "x" * room}
    assert Frames().feed(encode(message)) == [message]
    with pytest.raises(ProtocolError):
        encode({"k": "x" * (room + 1)})


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"{} {}", b'{"a":}', b"\xff\xfe", b"nul", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused_for_good(body: bytes) -> None:
    frames = Frames()
    with pytest.raises(ProtocolError):
        frames.feed(len(body).to_bytes(4, "big") + body)
    with pytest.raises(ProtocolError):
        frames.feed(encode({}))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, two = (Channel(sock) for sock in socket.socketpair())
    yield one, two
    one.close()
    two.close()


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def test_descriptors_stay_with_their_message(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    reader, writer = os.pipe()
    with open(os.devnull, "rb") as devnull:
        sender.send({"n": 1})
        sender.send({"n": 2}, [reader, writer])
        sender.send({"n": 3})
        sender.send({"n": 4}, [devnull.fileno()])
        received: list[tuple[dict[str, Any], list[int]]] = []
        while len(received) < 4:
            received += receiver.receive()
        sent = {1: [], 2: [reader, writer], 3: [], 4: [devnull.fileno()]}
        for message, fds in received:
            assert [_identity(fd) for fd in fds] == [_identity(fd) for fd in sent[message["n"]]]
            assert not any(os.get_inheritable(fd) for fd in fds)
            for fd in fds:
                os.close(fd)
    os.close(reader)
    os.close(writer)


def test_claimed_descriptors_that_did_not_come_are_refused(pair: tuple[Channel, Channel]) -> None:
    for claim in (1, -1, "two", MAX_FDS + 1):
        one, two = (Channel(sock) for sock in socket.socketpair())
        one.send({"fds": claim})
        with pytest.raises(ProtocolError):
            two.receive()
        one.close()
        two.close()


def test_unclaimed_descriptors_are_closed_with_the_channel() -> None:
    one, two = socket.socketpair()
    receiver = Channel(two)
    reader, writer = os.pipe()
    socket.send_fds(one, [encode({"op": "x"})], [writer])
    os.close(writer)
    assert receiver.receive() == [({"op": "x"}, [])]
    receiver.close()
    assert os.read(reader, 1) == b""  # the last writing end has gone
    os.close(reader)
    one.close()


def test_a_closed_peer_is_the_end(pair: tuple[Channel, Channel]) -> None:
    pair[0].close()
    with pytest.raises(EOFError):
        pair[1].receive()


def test_a_peer_that_does_not_read_is_an_error_and_not_a_wait(pair: tuple[Channel, Channel]) -> None:
    pair[0].sock.setblocking(False)
    with pytest.raises(OSError):
        for _ in range(1000):
            pair[0].send({"text": "x" * 10_000})


def test_a_shim_imports_little() -> None:
    """Each module that comes along costs memory on every node; enum and re alone 0.3 MiB in every pod."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shims.nursery_process; print(*sys.modules)"
    root = os.path.dirname(os.path.dirname(shims.__file__))
    argv = [sys.executable, "-E", "-s", "-S", "-B", "-P", "-c", code, root]
    modules = set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    assert "shims.shim" in modules
    assert "shims.messages" not in modules
    assert not modules & {"enum", "re", "json", "socket", "signal", "typing", "collections", "logging", "criserver"}
