"""Numbers in text from outside."""

from __future__ import annotations


def decimal(text: str | bytes, most: int) -> int | None:
    """The number in ``text``, which must have ASCII digits alone; None if it has others, or for more than ``most``.

    The digits are counted before they are converted: int() takes long for many digits, and raises ValueError above
    4,300 of them.
    """
    digits = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0") or b"0"
    if len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
