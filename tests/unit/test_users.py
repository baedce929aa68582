"""Who a container runs as."""

from __future__ import annotations

import pytest

from criserver.errors import FailedPreconditionError
from criserver.model import User
from criserver.oci import users

PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/var/www:/bin/false\nbroken line\n1000:x:7:8::/:/bin/sh\n"
GROUP = "root:x:0:\nusers:x:100:web,other\nweb:x:44:\naudio:x:29:web\n"


def resolve(image_user="", user=None, name="", group=None, supplemental=(), strict=False) -> User:
    return users.resolve(
        image_user=image_user,
        run_as_user=user,
        run_as_username=name,
        run_as_group=group,
        supplemental=supplemental,
        strict=strict,
        passwd=PASSWD,
        group=GROUP,
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, User(0, 0, (0,))),
        ({"image_user": "web"}, User(33, 44, (29, 44, 100))),
        ({"image_user": "33"}, User(33, 44, (29, 44, 100))),
        ({"image_user": "web:users"}, User(33, 100, (29, 100))),
        ({"image_user": "web:1234"}, User(33, 1234, (29, 100, 1234))),
        ({"image_user": "4711"}, User(4711, 0, (0,))),
        ({"image_user": "1000"}, User(7, 8, (8,))),
        ({"image_user": "web", "user": 5}, User(5, 0, (0,))),
        ({"image_user": "web:users", "user": 33}, User(33, 44, (29, 44, 100))),
        ({"user": 5, "group": 6}, User(5, 6, (6,))),
        ({"name": "web", "group": 6}, User(33, 6, (6, 29, 100))),
        ({"user": 33, "supplemental": (1, 2)}, User(33, 44, (1, 2, 29, 44, 100))),
        ({"user": 33, "supplemental": (1, 2), "strict": True}, User(33, 44, (1, 2, 44))),
    ],
)
def test_numbers(asked, expected):
    assert resolve(**asked) == expected


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"image_user": "nobody"}, "'nobody'"),
        ({"name": "nobody"}, "'nobody'"),
        ({"name": "4711"}, "'4711'"),
        ({"image_user": "web:nogroup"}, "'nogroup'"),
        ({"image_user": "-1"}, "'-1'"),
        ({"image_user": "99999999999"}, "'99999999999'"),
    ],
)
def test_a_name_that_the_image_does_not_have_is_refused(asked, word):
    with pytest.raises(FailedPreconditionError, match=word):
        resolve(**asked)
