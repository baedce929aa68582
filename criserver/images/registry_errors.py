"""The refusals of registries, as the classes of criserver/errors.py (OCI distribution-spec, Error Codes)."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from criserver.errors import (
    CriError,
    DataLossError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from criserver.images.hosts import RegistryHost
from criserver.images.retries import TEMPORARY, TryAgainError, retry_after
from criserver.images.transport import read_bounded
from criserver.text import shown

# Bytes and seconds. A longer or slower body has no words for a person.
_MAX_BODY = 16 << 10
_BODY_TIMEOUT = 10.0


async def refusal(
    response: aiohttp.ClientResponse, path: str, server: RegistryHost, *, ranged: bool = False
) -> CriError:
    """The error for a response that is no success, with the registry's own words if it has some.

    ``ranged`` says that a part of a blob was asked for. DataLossError is for a host that does not send that part, but
    may send the whole.
    """
    words = await _reason(response)
    answer = f"{path}: {response.status} {response.reason or ''}".rstrip() + (f" ({words})" if words else "")
    if server.anonymous:
        answer += f" from {server.url}, to which the registry redirects"
    match response.status:
        case 401 if server.anonymous:
            return UnauthenticatedError(
                f"{answer}; the pull secret is not sent there, and it gives no anonymous access"
            )
        case 403 if server.anonymous:
            return PermissionDeniedError(answer)
        case 401:
            return UnauthenticatedError(f"{answer}; the image is private or does not exist: check the pull secret")
        case 403:
            return PermissionDeniedError(f"{answer}; the credentials do not allow to pull it")
        case 404:
            return NotFoundError(answer)
        case status if status in TEMPORARY:
            after = retry_after(response.headers)
            asks = f"; the server asks to wait {after:.0f} s" if after else ""
            return TryAgainError(f"{answer}{asks}", after)
        case _ if ranged:
            return DataLossError(f"{answer}: the host does not send what comes after the part that was received")
        case _:
            return UnavailableError(answer)


async def _reason(response: aiohttp.ClientResponse) -> str:
    """The reason that the registry gives for a refusal, "" if there is none.

    It is the first error of a document (OCI distribution-spec, "Error Codes"), or plain text. An answer that cannot be
    read, or does not come, is no reason.
    """
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            body = await read_bounded(response, _MAX_BODY, "the refusal")
    except (CriError, aiohttp.ClientError, TimeoutError):
        return ""
    if response.content_type == "text/plain":
        return shown(body.decode(errors="replace").strip())
    try:
        first = json.loads(body)["errors"][0]
        return ": ".join(shown(first[key]) for key in ("code", "message") if isinstance(first.get(key), str))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""  # the body has another form
