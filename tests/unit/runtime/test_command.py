"""What programs print, as text for people."""

from __future__ import annotations

import pytest

from criserver.runtime.command import Done


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (b'time="2026-11-27T04:33:44Z" level=error msg="container does not exist"\n', "container does not exist"),
        (b'time="1" level=warning msg="a \\"b\\""\ntime="2" level=error msg=short\n', 'a "b"\nshort'),
        (rb'time="1" level=error msg="bell \a"', r"bell \a"),
        (b"no log line: level=error\n", "no log line: level=error"),
        (b'time="1" level=error msg="x" more=fields\n', 'time="1" level=error msg="x" more=fields'),
        (b"\xff\n", "\ufffd"),
        (b"", ""),
    ],
)
def test_only_the_message_of_a_line_of_runcs_log_is_told(printed: bytes, message: str) -> None:
    assert Done(1, b"", printed).message == message
