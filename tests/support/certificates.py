"""An authority of the tests' own, by openssl: certificates for servers and for clients on the loopback interface."""

from __future__ import annotations

import os
import ssl
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Certificate:
    """PEM files."""

    cert: str
    key: str

    def server_context(self, clients: Certificate | None = None) -> ssl.SSLContext:
        """TLS for a server with this certificate, which wants one of ``clients`` from its clients."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert, self.key)
        if clients:
            context.load_verify_locations(clients.cert)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Authority:
    """Keeps its files in ``directory``; ``own`` is its own certificate."""

    def __init__(self, directory: str, name: str = "ca") -> None:
        self._directory = directory
        self.own = self._make(name, "-addext", "basicConstraints=critical,CA:TRUE")

    def issue(self, name: str, *, names: str = "IP:127.0.0.1,DNS:localhost", key: str = "ec") -> Certificate:
        """A certificate for a server or a client with these alternative names; ``key`` is ec or rsa."""
        return self._make(
            name, "-CA", self.own.cert, "-CAkey", self.own.key, "-addext", f"subjectAltName={names}", key=key
        )

    def _make(self, name: str, *options: str, key: str = "ec") -> Certificate:
        made = Certificate(*(os.path.join(self._directory, f"{name}.{end}") for end in ("pem", "key")))
        kind = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["rsa:2048"]
        command = ["openssl", "req", "-x509", "-newkey", *kind, "-nodes", "-days", "1", "-subj", f"/CN={name}"]
        subprocess.run([*command, "-keyout", made.key, "-out", made.cert, *options], check=True, capture_output=True)
        return made
