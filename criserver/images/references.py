"""Image references: the text by which a pod names its image, parsed and made canonical.

The grammar and the defaults are Docker's, as in every runtime: ``busybox`` is ``docker.io/library/busybox:latest``.
Pure functions.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from criserver.errors import InvalidArgumentError
from criserver.images.digests import is_digest
from criserver.text import quoted

DEFAULT_DOMAIN = "docker.io"

_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library"
_DEFAULT_TAG = "latest"
_MAX_TEXT = 1024  # a name, a tag and a digest at their longest
_MAX_NAME = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[(?P<address>[a-fA-F0-9:]+)\])(?::(?P<port>[0-9]{{1,5}}))?")
_ATOM = r"[a-z0-9]+"
_COMPONENT = rf"{_ATOM}(?:(?:[._]|__|-+){_ATOM})*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A canonical reference. If it has a digest, the tag does not select anything, but is kept as written."""

    domain: str
    path: str
    tag: str | None
    digest: str | None

    @property
    def name(self) -> str:
        """The domain and the path of the repository, without tag and digest."""
        return f"{self.domain}/{self.path}"

    def __str__(self) -> str:
        """``name@digest`` if there is a digest, else ``name:tag``. Images are recorded under this form."""
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def parse(text: str) -> Reference:
    """The canonical form of ``text``; without tag and digest the tag is ``latest``.

    Raises InvalidArgumentError with the part that is wrong. Digests other than sha256 and sha512 are refused.
    """
    if not text:
        raise InvalidArgumentError("the image reference is empty; an image must be named")
    if len(text) > _MAX_TEXT:
        raise InvalidArgumentError(f"image reference {quoted(text)} is longer than {_MAX_TEXT} characters")
    if _HEX64.fullmatch(text):
        raise _invalid(text, "64 hexadecimal digits are an image ID, not a name")
    domain, rest = _split_domain(text)
    rest, at, digest = rest.partition("@")
    path, colon, tag = rest.partition(":")
    _check_name(text, domain, path)
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, f"tag {quoted(tag)} is not 1 to 128 letters, digits, '_', '.' and '-'")
    if at and not is_digest(digest):
        what = "'sha256:' and 64 lowercase hexadecimal digits, or 'sha512:' and 128"
        raise _invalid(text, f"digest {quoted(digest)} is not {what}")
    if not colon and not at:
        tag = _DEFAULT_TAG
    return Reference(domain, path, tag or None, digest or None)


def full_name(text: str) -> str:
    """A name with its registry and its tag or digest; a text that is no name, as it is."""
    try:
        return str(parse(text))
    except InvalidArgumentError:
        return text


def _split_domain(text: str) -> tuple[str, str]:
    """The first component is a domain if it has a '.', a ':' or an uppercase letter, or is ``localhost``."""
    first, slash, rest = text.partition("/")
    is_domain = slash and (first == "localhost" or "." in first or ":" in first or first != first.lower())
    domain, path = (first, rest) if is_domain else (DEFAULT_DOMAIN, text)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{_OFFICIAL}/{path}"
    return domain, path


def _check_name(text: str, domain: str, path: str) -> None:
    match = _DOMAIN.fullmatch(domain)
    if match is None:
        raise _invalid(text, f"{quoted(domain)} is not a host name with an optional port")
    if match["address"] and not is_ipv6(match["address"]):
        raise _invalid(text, f"{quoted(match['address'])} is not an IPv6 address")
    if match["port"] and not 0 < int(match["port"]) < 65536:
        raise _invalid(text, f"port {match['port']} is not between 1 and 65535")
    if path != path.lower():
        raise _invalid(text, f"the repository name {quoted(path)} must be lowercase")
    if not _PATH.fullmatch(path):
        raise _invalid(text, f"{quoted(path)} is not a repository name")
    if len(domain) + 1 + len(path) > _MAX_NAME:
        raise _invalid(text, f"the name is longer than {_MAX_NAME} characters")


def is_ipv6(text: str) -> bool:
    """Whether a text is an IPv6 address."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _invalid(text: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"image reference {quoted(text)}: {reason}")
