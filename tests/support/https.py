"""HTTPS requests that do not verify the certificate: to a kubelet, or to an API server of a test."""

from __future__ import annotations

import ssl
import urllib.request


def fetched(url: str, seconds: float, **headers: str) -> str:
    """What is answered within some seconds. Raises OSError."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=seconds, context=context) as answer:
        return str(answer.read().decode())
