"""Numbers in text that others wrote."""

from __future__ import annotations


def decimal(text: str | bytes, most: int) -> int | None:
    """The number that ``text`` is, in ASCII digits and nothing else; None where it is none, or more than ``most``.

    The digits are counted before they are converted: int() takes long for many, and raises ValueError above 4,300.
    """
    digits = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0") or b"0"
    if len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
