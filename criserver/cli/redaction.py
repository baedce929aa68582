"""Secrets are taken out of what goes into a bug report.

1. The values of a container's environment are always replaced.
2. Elsewhere a value is replaced if its name says that it is secret. So are the user and the password of a URL.
3. A secret under another name stays. The command tells the operator to read the file before sending it.
"""

from __future__ import annotations

import re
from typing import Any

REMOVED = "<removed>"
_NAME = r"token|passw(?:or)?d|secret|credential|api[_-]?key|private[_-]?key|auth[_-]?key|authorization|signature"
_SECRET = re.compile(_NAME, re.IGNORECASE)
# Each repetition has a limit: a pod could give a text for which the search takes the square of its length.
_ASSIGNED = re.compile(
    rf"((?:{_NAME})[\w.-]{{0,64}}[\"']?\s{{0,8}}[=:]\s{{0,8}}[\"']?(?:(?:bearer|basic)\s{{1,8}})?)[^\s\"',;&]+",
    re.IGNORECASE,
)
# A password may have any character but "/", which ends the authority. A long one is taken out up to its last "@".
_URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]{0,31}://)[^/\s\"'<>]{1,1024}@", re.IGNORECASE)
# kubectl keeps the whole manifest in it, with the values of variables.
_MANIFEST = "kubectl.kubernetes.io/last-applied-configuration"


def text_without_secrets(text: str) -> str:
    """A text without users and passwords of URLs, and without the values of assignments to secret names."""
    return _ASSIGNED.sub(rf"\1{REMOVED}", _URL_USER.sub(rf"\1{REMOVED}@", text))


def without_secrets(document: Any, name: str = "") -> Any:
    """A JSON document without secrets; ``name`` is the key whose value it is."""
    if name == "env" and isinstance(document, list):
        return [f"{str(item).partition('=')[0]}={REMOVED}" for item in document]
    if name == "envs" and isinstance(document, list):
        return [{**item, "value": REMOVED} if isinstance(item, dict) else REMOVED for item in document]
    if isinstance(document, dict):
        return {key: without_secrets(value, key) for key, value in document.items()}
    if isinstance(document, list):
        return [
            REMOVED if _is_secret_option(before) and isinstance(item, str) else without_secrets(item)
            for before, item in zip([None, *document], document, strict=False)
        ]
    if isinstance(document, str):
        secret = name == _MANIFEST or (document and _SECRET.search(name))
        return REMOVED if secret else text_without_secrets(document)
    return document


def _is_secret_option(item: Any) -> bool:
    """Whether an argument is an option such as ``--password``, whose value is the next argument."""
    return isinstance(item, str) and item.startswith("-") and "=" not in item and _SECRET.search(item) is not None
