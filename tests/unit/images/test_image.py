"""What of images/ needs neither a registry nor root."""

from __future__ import annotations

from criserver.images import Image, ImageConfig
from criserver.images.image_user import ImageUser


def test_the_user_of_an_image_is_parsed_as_its_containers_run() -> None:
    image = Image("sha256:", (), (), 0, ImageConfig(user="01000:users"), "", "", pinned=False)
    assert image.user == ImageUser(1000, "users")
