"""Text from outside, made fit for a message: printable, and of limited length.

Requests, registries, plugins and OCI runtimes choose the length and the characters of their texts. An error that quotes
such a text goes to a terminal, a log and a gRPC status.
"""

from __future__ import annotations

_SHOWN = 200
# Bytes of a status on the wire. gRPC sends it in a header, percent-encoded. Clients accept 8 KiB of headers in all. A
# longer status becomes RESOURCE_EXHAUSTED at the client, without its text.
_MAX_STATUS = 4096
_GAP = "…"
# The share of a cut status that is taken from the end of the text, where the reason often is.
_END = 0.25


def printable(text: str) -> str:
    """The text with every unprintable character escaped: controls, bidirectional marks, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: object, limit: int = _SHOWN) -> str:
    """The first ``limit`` characters of a text, printable."""
    whole = str(text)
    return printable(whole) if len(whole) <= limit else printable(whole[:limit]) + _GAP


def quoted(text: str, limit: int = _SHOWN) -> str:
    """As :func:`shown`, in quotes: for what is named in a sentence."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + _GAP


def status(text: str) -> str:
    """The text of a gRPC status: printable, and without its middle if it is too long."""
    # Cut before escaping, so that only both ends of a text of megabytes are examined.
    if len(text) > 2 * _MAX_STATUS:
        text = text[:_MAX_STATUS] + _GAP + text[-_MAX_STATUS:]
    text = printable(text)
    if _on_the_wire(text) <= _MAX_STATUS:
        return text
    room = _MAX_STATUS - _on_the_wire(_GAP)
    end = _fitting(text[::-1], int(room * _END))[::-1]
    return _fitting(text, room - _on_the_wire(end)) + _GAP + end


def _fitting(text: str, room: int) -> str:
    """The beginning of a text that takes at most ``room`` bytes on the wire."""
    for number, character in enumerate(text):
        room -= _on_the_wire(character)
        if room < 0:
            return text[:number]
    return text


def _on_the_wire(text: str) -> int:
    """Bytes of the text when all but printable ASCII is percent-encoded (gRPC over HTTP/2, "Responses")."""
    raw = text.encode()
    return len(raw) + 2 * sum(not 0x20 <= byte <= 0x7E or byte == 0x25 for byte in raw)
