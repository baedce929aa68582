"""TLS contexts: servers that Go connects to, and what is read for a context."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from criserver.images.hosts import RegistryHost
from criserver.images.tls import context_for
from tests.support.certificates import Authority

# TLS 1.2, ECDHE-RSA-AES128-GCM-SHA256, no compression, and no extensions.
_BODY = b"\3\3" + bytes(32) + b"\0" + b"\xc0\x2f" + b"\0"
_HELLO = b"\2" + len(_BODY).to_bytes(3, "big") + _BODY
SERVER_HELLO = b"\x16\3\3" + len(_HELLO).to_bytes(2, "big") + _HELLO


@pytest.mark.parametrize("skip_verify", [True, False])
def test_a_server_without_secure_renegotiation(skip_verify: bool) -> None:
    """RFC 5746 is from 2010. Load balancers without it are still in use."""
    context = context_for(RegistryHost("https://r.example", skip_verify=skip_verify), identified=False)
    incoming = ssl.MemoryBIO()
    client = context.wrap_bio(incoming, ssl.MemoryBIO(), server_hostname="r.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(SERVER_HELLO)
    with pytest.raises(ssl.SSLWantReadError):  # it waits for the certificate
        client.do_handshake()


def test_the_systems_bundle_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, system = Authority(str(tmp_path), "own").own.cert, Authority(str(tmp_path), "system").own.cert
    monkeypatch.setenv("SSL_CERT_FILE", system)
    read: list[Any] = []
    load = ssl.SSLContext.load_verify_locations

    def counted(self: ssl.SSLContext, cafile: str) -> None:
        read.append(cafile)
        load(self, cafile)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", counted)
    host = RegistryHost("https://r.example", ca=(own,))
    assert context_for(host, identified=False).cert_store_stats()["x509_ca"] == 2
    assert read == [own]


def test_a_bundle_that_openssl_passes_over_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, system = Authority(str(tmp_path), "own").own.cert, Authority(str(tmp_path), "system").own.cert
    monkeypatch.setenv("SSL_CERT_FILE", system)
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda *_: None)
    host = RegistryHost("https://r.example", ca=(own,))
    assert context_for(host, identified=False).cert_store_stats()["x509_ca"] == 2
