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


def context_for(host: RegistryHost, *, identified: bool) -> ssl.SSLContext:
    """A context with the system's and the host's authorities; if ``identified``, with the host's client certificate.

    The first of several client certificates is used. Raises FailedPreconditionError with the file's name.
    """
    client = host.client[:1] if identified else ()
    if not (host.ca or client or host.skip_verify):
        return _default()
    if host.skip_verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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
    context = ssl.create_default_context()
    # OpenSSL itself ignores a bundle that it cannot open, such as when no descriptor is left.
    if bundle := ssl.get_default_verify_paths().cafile:
        with suppress(ssl.SSLError):  # it has no certificate; a directory may have some
            context.load_verify_locations(bundle)
    # As Go does it, because registries' own authorities were tested with Go programs: a root need not have every
    # extension of RFC 5280, and an intermediate certificate in the store is trusted by itself.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
