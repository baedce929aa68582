"""The user that an image names: ImageStatus shows it, and its containers run as it."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.errors import InvalidArgumentError
from criserver.model import MAX_ID
from criserver.numbers import decimal
from criserver.text import quoted

# Bytes. Names of users have 32 at most on Debian (useradd(8)), 256 with the kernel's LOGIN_NAME_MAX.
_MAX_NAME = 256
_SHOWN = 64


@dataclass(frozen=True, slots=True)
class ImageUser:
    """A user and a group, each as a number or a name; "" if the image has none."""

    user: int | str = ""
    group: int | str = ""


def parse(text: str) -> ImageUser:
    """The user of an image's configuration: "user" or "user:group" (OCI image-spec, config, "User").

    All digits, also with a "+" before them, are a number and never a name, so a check for root and the runtime see the
    same number. An empty group after a colon is 0, as in containerd. Raises InvalidArgumentError for a number that is
    no ID, and for a name that is too long for an account.
    """
    user, colon, group = text.partition(":")
    return ImageUser(_part(user, "user"), _part(group or "0", "group") if colon else "")


def _part(text: str, what: str) -> int | str:
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdigit():
        number = decimal(digits, MAX_ID)
        if number is None:
            raise InvalidArgumentError(f"the image's {what} {quoted(text, _SHOWN)} is no ID: the largest is {MAX_ID}")
        return number
    if len(text.encode()) > _MAX_NAME:
        shown = quoted(text, _SHOWN)
        raise InvalidArgumentError(f"the image's {what} {shown} has a name of more than {_MAX_NAME} bytes")
    return text
