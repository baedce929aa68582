"""What of images/ needs neither a registry nor root."""

from __future__ import annotations

import subprocess
import sys

import pytest

from criserver.errors import UnauthenticatedError
from criserver.images import Credentials, Image, ImageConfig
from criserver.images.auth import Authorizer
from criserver.images.hosts import Host

HUB = Host("https://registry-1.docker.io", origin=True)
OWN = Host("https://r.example:5000", origin=True)
MIRROR = Host("https://m.example", namespace="r.example:5000")


def test_the_http_client_is_not_imported_before_the_first_pull():
    program = "import sys, criserver.images; assert 'aiohttp' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [
        ("", None, ""),
        ("0", 0, ""),
        ("1000:50", 1000, ""),
        ("nobody", None, "nobody"),
        ("nobody:50", None, "nobody"),
        (":50", None, ""),
        ("-1", None, "-1"),
        ("²", None, "²"),
        ("9" * 30, None, "9" * 30),
    ],
)
def test_the_user_of_an_image(user, uid, name):
    image = Image("sha256:", (), (), 0, ImageConfig(user=user), "", "", pinned=False)
    assert (image.uid, image.username) == (uid, name)


@pytest.mark.parametrize(
    ("host", "server_address", "sent"),
    [
        (OWN, "", True),
        (OWN, "r.example:5000", True),
        (OWN, "https://r.example:5000/v2/", True),
        (OWN, "https://r.example", False),
        (OWN, "https://other.example", False),
        (HUB, "https://index.docker.io/v1/", True),
        (HUB, "docker.io", True),
        (HUB, "r.example:5000", False),
        (MIRROR, "", False),
        (MIRROR, "https://m.example", False),
    ],
)
def test_who_gets_credentials(host, server_address, sent):
    authorizer = Authorizer(Credentials("me", "secret", server_address))
    assert authorizer.header(host) is None
    assert authorizer.answer(host, ['Basic realm="x"']) is sent
    assert authorizer.header(host) == ("Basic bWU6c2VjcmV0" if sent else None)
    assert not authorizer.answer(host, ['Basic realm="x"'])


def test_challenges_without_an_answer():
    assert not Authorizer(None).answer(OWN, ["Basic"])
    assert not Authorizer(Credentials("me", "secret")).answer(OWN, [])
    with pytest.raises(UnauthenticatedError, match="bearer"):
        Authorizer(None).answer(OWN, ['Bearer realm="x"'])
