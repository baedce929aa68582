"""Secrets are taken out of what goes into a bug report.

What a container's environment has is always replaced. Elsewhere a value is replaced whose name says that it is secret,
and the user and password of a URL. So a secret under a name that says nothing stays: the operator is told to look.
"""

from __future__ import annotations

import re
from typing import Any

REMOVED = "<removed>"
_NAME = r"token|passw(?:or)?d|secret|credential|api[_-]?key|private[_-]?key|auth[_-]?key|authorization"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?:{_NAME})[\w.-]*[\"']?\s*[=:]\s*[\"']?(?:(?:bearer|basic)\s+)?)[^\s\"',;&]+", re.IGNORECASE
)
_URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
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
        return [without_secrets(item) for item in document]
    if isinstance(document, str):
        secret = name == _MANIFEST or (document and _SECRET.search(name))
        return REMOVED if secret else text_without_secrets(document)
    return document
