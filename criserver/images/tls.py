"""TLS for a host: the certificate authorities that are trusted, and the client certificate.

A context with the system's authorities takes some tens of milliseconds and 0.7 MiB, so all hosts without settings of
their own share one.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from functools import cache

from criserver.errors import FailedPreconditionError
from criserver.images.hosts import RegistryHost

# OpenSSL's SSL_OP_LEGACY_SERVER_CONNECT. Python's ssl has had the name since 3.12.
_LEGACY_SERVER_CONNECT = 0x4


def context_for(host: RegistryHost, *, identified: bool) -> ssl.SSLContext:
    """A context with the system's and the host's authorities; if ``identified``, with the host's client certificate.

    The first of several client certificates is used. Raises FailedPreconditionError with the file's name.
    """
    client = host.client[:1] if identified else ()
    if not (host.ca or client or host.skip_verify):
        return _default()
    if host.skip_verify:
        context = _as_lenient_as_go(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = _with_the_systems_authorities()
    path = ""
    try:
        for path in host.ca:
            context.load_verify_locations(path)
        for path, key in client:
            context.load_cert_chain(path, key, password="")  # without it OpenSSL would ask on the terminal
    except OSError as e:  # ssl.SSLError is one
        raise FailedPreconditionError(f"certificate file {path}: {e.strerror or e}") from e
    return context


@cache
def _default() -> ssl.SSLContext:
    return _with_the_systems_authorities()


def _with_the_systems_authorities() -> ssl.SSLContext:
    context = _as_lenient_as_go(ssl.create_default_context())
    # OpenSSL itself ignores a bundle that it cannot open, such as when no descriptor is left.
    if not context.cert_store_stats()["x509_ca"] and (bundle := ssl.get_default_verify_paths().cafile):
        with suppress(ssl.SSLError):  # it has no certificate; a directory may have some
            context.load_verify_locations(bundle)
    return context


def _as_lenient_as_go(context: ssl.SSLContext) -> ssl.SSLContext:
    """Accept what Go accepts, because registries and their authorities were tested with Go programs.

    1. A root need not have every extension of RFC 5280.
    2. An intermediate certificate in the store is trusted by itself.
    3. A server need not know RFC 5746 (secure renegotiation). OpenSSL does not renegotiate with such a server.
    """
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= _LEGACY_SERVER_CONNECT
    return context
