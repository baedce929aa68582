"""The certificate of the streaming server, and the authorities of its clients: files that others replace at any time.

Programs such as cert-manager renew a certificate by new files under the old names. The files are looked at for each
connection, and read again if one has changed.
"""

from __future__ import annotations

import os
import ssl

import structlog

from criserver.errors import FailedPreconditionError
from snapshotter.threads import in_loose_thread

log = structlog.get_logger(__name__)

# What identifies the state of each file. A replaced file has another inode, a rewritten one another time.
_State = tuple[tuple[int, ...], ...]


class ServerCertificate:
    """A PEM file of the certificate with its chain, and one of its key. ``authorities``: "" or a PEM file.

    With ``authorities`` a client needs a certificate of one of them.
    """

    def __init__(self, certificate: str, key: str, authorities: str = "") -> None:
        """Read the files. Raises FailedPreconditionError if they cannot be used."""
        self._files = [file for file in (certificate, key, authorities) if file]
        self._certificate, self._key, self._authorities = certificate, key, authorities
        self._refused: _State = ()
        try:
            self._state = self._look()
            self._context = self._read()
        except OSError as e:
            raise FailedPreconditionError(self._message(e)) from e

    async def context(self) -> ssl.SSLContext:
        """The context for the next connection. Files that cannot be used are logged, and the last ones stay in use."""
        return await in_loose_thread(self._latest, "certificate")

    def _latest(self) -> ssl.SSLContext:
        state: _State = ()
        try:
            state = self._look()
            if state != self._state:
                self._context, self._state = self._read(), state
                log.info("streaming: the certificate was read again", files=self._files)
            self._refused = ()
        except OSError as e:
            # The certificate and its key are replaced one after the other: the next connection tries again.
            if state != self._refused or not state:
                self._refused = state
                log.warning("streaming: the last certificate stays in use", error=self._message(e))
        return self._context

    def _look(self) -> _State:
        found = (os.stat(file) for file in self._files)
        return tuple((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns) for f in found)

    def _read(self) -> ssl.SSLContext:
        """Raises OSError; ssl.SSLError is one."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._certificate, self._key, password="")  # without it OpenSSL would ask a terminal
        if self._authorities:
            context.load_verify_locations(self._authorities)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _message(self, error: OSError) -> str:
        keys = ", ".join(("tls_cert", "tls_key", "tls_ca")[: len(self._files)])
        where = error.filename or ", ".join(self._files)
        return f"the files of [streaming] {keys} cannot be used: {where}: {error.strerror or error}"
