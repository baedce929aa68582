"""The user and the groups that a container runs as."""

from __future__ import annotations

import io
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.images.image_user import ImageUser, parse
from criserver.model import MAX_GROUPS, User
from criserver.oci import container_user

PASSWD = (
    b"1000:x:0:0::/root:/bin/sh\nroot:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/var/www:/bin/false\n"
    b"broken line\nhuge:x:4294967296:0::/:\n4711:x:7:8::/:/bin/sh\n"
)
GROUP = b"2000:x:0:\nroot:x:0:\nusers:x:100:web,other\nweb:x:44:\naudio:x:29:web\n"


def resolve(
    user: int | str = "",
    group: int | str = "",
    supplemental: tuple[int, ...] = (),
    strict: bool = False,
    passwd: bytes = PASSWD,
) -> User:
    return container_user.resolve(
        user=user,
        group=group,
        supplemental=supplemental,
        strict=strict,
        passwd=io.BytesIO(passwd),
        groups=io.BytesIO(GROUP),
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, User(0, 0, (0,))),
        ({"user": "web"}, User(33, 44, (29, 44, 100))),
        ({"user": 33}, User(33, 44, (29, 44, 100))),
        ({"user": "web", "group": "users"}, User(33, 100, (29, 100))),
        ({"user": "web", "group": 1234}, User(33, 1234, (29, 100, 1234))),
        ({"user": 4711}, User(4711, 0, (0,))),
        ({"user": 7}, User(7, 8, (8,))),
        ({"user": 5, "group": 6}, User(5, 6, (6,))),
        ({"group": "users"}, User(0, 100, (100,))),
        ({"user": 33, "supplemental": (1, 2)}, User(33, 44, (1, 2, 29, 44, 100))),
        ({"user": 33, "supplemental": (1, 2), "strict": True}, User(33, 44, (1, 2, 44))),
    ],
)
def test_numbers_and_names(asked: dict[str, Any], expected: User) -> None:
    assert resolve(**asked) == expected


FORMS_PASSWD = b"toor:x:0:9::/:/bin/sh\nroot:x:0:0::/root:/bin/sh\napp:x:1001:1002::/:/bin/sh\n1003:x:7:7::/:/bin/sh\n"
FORMS_GROUP = b"root:x:0:\nwheel:x:10:toor\napp:x:1002:\ndata:x:2000:app,other\nweb:x:3000:\n1004:x:8:\n"


@pytest.mark.parametrize(
    ("form", "uid", "gid", "others"),
    [
        # The forms that Docker's documentation of USER has, with the IDs that containerd gives.
        ("", 0, 0, {10}),
        ("root", 0, 0, set()),
        ("app", 1001, 1002, {2000}),
        ("1001", 1001, 1002, {2000}),
        ("0", 0, 9, {10}),
        ("4242", 4242, 0, set()),
        ("app:web", 1001, 3000, {2000}),
        ("app:3000", 1001, 3000, {2000}),
        ("1001:web", 1001, 3000, {2000}),
        ("1001:3000", 1001, 3000, {2000}),
        ("1001:4000", 1001, 4000, {2000}),
        ("4242:4000", 4242, 4000, set()),
        ("4242:web", 4242, 3000, set()),
        ("0:0", 0, 0, {10}),
        # Forms that it does not have, and that images have.
        ("app:", 1001, 0, {2000}),
        ("1001:", 1001, 0, {2000}),
        (":web", 0, 3000, set()),
        (":3000", 0, 3000, set()),
        (":", 0, 0, set()),
        ("01001", 1001, 1002, {2000}),
        ("+1001:+3000", 1001, 3000, {2000}),
        # A number is never a name.
        ("1003", 1003, 0, set()),
    ],
)
def test_the_forms_of_user(form: str, uid: int, gid: int, others: set[int]) -> None:
    named = parse(form)
    found = container_user.resolve(
        user=named.user,
        group=named.group,
        supplemental=(),
        strict=False,
        passwd=io.BytesIO(FORMS_PASSWD),
        groups=io.BytesIO(FORMS_GROUP),
    )
    assert found == User(uid, gid, tuple(sorted({gid} | others)))


@pytest.mark.parametrize("form", ["nobody", "app:nogroup", "1001:nogroup", "app:web:x", "-1", "app:-1", " app", "1_0"])
def test_a_form_of_user_that_names_nobody(form: str) -> None:
    named = parse(form)
    with pytest.raises(FailedPreconditionError, match="is not in the image's"):
        container_user.resolve(
            user=named.user,
            group=named.group,
            supplemental=(),
            strict=False,
            passwd=io.BytesIO(FORMS_PASSWD),
            groups=io.BytesIO(FORMS_GROUP),
        )


def test_a_number_is_never_looked_up_as_a_name() -> None:
    """CVE-2016-3697, CVE-2026-46680: an account of root's that is named "1000" is not the user 1000."""
    assert resolve(1000) == User(1000, 0, (0,))
    # Without it among the groups of runc before 1.3, which would look for its name.
    assert resolve(1, 2000) == User(1, 2000, ())
    with pytest.raises(FailedPreconditionError, match="named '2000'"):
        resolve(1, 1, supplemental=(2000,))
    assert resolve(2**32 - 2).uid == 2**32 - 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"user": "nobody"}, "user 'nobody' is not in"),
        ({"user": "1000"}, "'1000' is given as a name, but it is a number"),
        ({"user": "web", "group": "2000"}, "'2000' is given as a name, but it is a number"),
        ({"user": "web", "group": "nogroup"}, "group 'nogroup' is not in"),
        ({"user": "-1"}, "user '-1' is not in"),
        ({"user": "huge"}, "user 'huge' is not in"),
        ({"user": "web\n"}, "is not in"),
    ],
)
def test_a_name_that_the_image_does_not_have_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(FailedPreconditionError, match=words):
        resolve(**asked)


def test_as_many_groups_as_the_kernel_takes() -> None:
    assert len(resolve(33, supplemental=tuple(range(3000, 3000 + MAX_GROUPS - 3))).groups) == MAX_GROUPS
    with pytest.raises(FailedPreconditionError, match=f"allows {MAX_GROUPS}"):
        resolve(33, supplemental=tuple(range(3000, 3000 + MAX_GROUPS)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ImageUser()),
        ("0", ImageUser(0)),
        ("1000:50", ImageUser(1000, 50)),
        ("01000", ImageUser(1000)),
        ("nobody", ImageUser("nobody")),
        ("nobody:50", ImageUser("nobody", 50)),
        ("nobody:", ImageUser("nobody", 0)),
        ("1000:", ImageUser(1000, 0)),
        (":users", ImageUser("", "users")),
        ("-1", ImageUser("-1")),
        ("+1000", ImageUser(1000)),
        ("+", ImageUser("+")),
        ("++1", ImageUser("++1")),
        (" 1000", ImageUser(" 1000")),
        ("1000\n", ImageUser("1000\n")),
        ("1_000", ImageUser("1_000")),
        ("0x3e8", ImageUser("0x3e8")),
        ("²", ImageUser("²")),
        ("１０００", ImageUser("１０００")),
        ("0" * 5000 + "7", ImageUser(7)),
        (str(2**32 - 2), ImageUser(2**32 - 2)),
    ],
)
def test_the_user_of_an_image(text: str, expected: ImageUser) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (str(2**32 - 1), "4294967295' is no ID"),
        (str(2**32), "4294967296' is no ID"),
        ("1:" + str(2**32), "group '4294967296' is no ID"),
        ("9" * 4301, "is no ID"),
        ("u" * 257, "more than 256 bytes"),
        ("x:" + "é" * 129, "group .* more than 256 bytes"),
    ],
)
def test_a_user_that_no_image_can_have_is_refused_in_few_words(text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        parse(text)
    assert len(str(caught.value)) < 200
