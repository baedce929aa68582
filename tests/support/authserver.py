"""An authorisation server of the tests' own, whose tokens a real docker-registry takes (distribution's token
specification): it checks who asks and which scopes they may have.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import BasicAuth, web

from tests.support.certificates import Certificate
from tests.support.ownregistry import serving

SERVICE = "registry of the tests"
ISSUER = "authorisation of the tests"


@dataclass
class AuthServer:
    """``allowed`` has for each user, "" for nobody in particular, the repositories that may be pulled.

    ``passwords`` and ``identities`` (identity token to user) say who is who. Tokens hold for ``lifetime`` seconds;
    the registry takes them a minute longer. ``requests`` are all that came, ``granted`` what each was given.
    """

    certificate: Certificate
    allowed: Mapping[str, frozenset[str]]
    passwords: dict[str, str] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)
    lifetime: int = 300
    requests: list[web.Request] = field(default_factory=list)
    granted: list[list[dict[str, Any]]] = field(default_factory=list)
    address: str = ""
    realm: str = ""

    def registry_options(self) -> dict[str, Any]:
        """What docker-registry's configuration says of this server."""
        return {
            "token": {
                "realm": self.realm,
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": self.certificate.cert,
            }
        }

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[AuthServer]:
        """Serve on a free port of the loopback interface."""
        async with serving(self.handle, tls) as self.address:
            self.realm = f"{'https' if tls else 'http'}://{self.address}/token"
            yield self

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        if request.method == "POST":
            form = await request.post()
            assert form["grant_type"] == "refresh_token"
            assert form["client_id"]
            user = self.identities.get(str(form["refresh_token"]))
            service, scopes = str(form["service"]), str(form["scope"]).split()
        else:
            user = self._user(request.headers.get("Authorization"))
            service, scopes = request.query.get("service", ""), request.query.getall("scope", [])
        if user is None:
            return web.json_response({"details": "incorrect username or password"}, status=401)
        assert service == SERVICE
        access = [entry for entry in map(self._access, scopes) if entry["name"] in self.allowed.get(user, ())]
        self.granted.append(access)
        name = "access_token" if request.method == "POST" else "token"
        return web.json_response({name: self._sign(user, access), "expires_in": self.lifetime})

    def _user(self, authorization: str | None) -> str | None:
        if authorization is None:
            return ""
        given = BasicAuth.decode(authorization)
        return given.login if self.passwords.get(given.login) == given.password else None

    @staticmethod
    def _access(scope: str) -> dict[str, Any]:
        kind, name, actions = scope.split(":")
        return {"type": kind, "name": name, "actions": actions.split(",")}

    def _sign(self, user: str, access: list[dict[str, Any]]) -> str:
        """A JSON web token by RS256, with the certificate that proves it."""
        with open(self.certificate.cert) as f:
            chain = ["".join(line for line in f.read().splitlines() if not line.startswith("-"))]
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        claims |= {"iat": now, "nbf": now - 1, "exp": now + self.lifetime}
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in ({"alg": "RS256", "x5c": chain}, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", self.certificate.key]
        done = subprocess.run(command, input=signed.encode(), capture_output=True, check=True)
        return f"{signed}.{_encoded(done.stdout)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
