"""What of images/ needs neither a registry nor root."""

from __future__ import annotations

import subprocess
import sys

import pytest

from criserver.images import Image, ImageConfig


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
