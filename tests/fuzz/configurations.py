"""Any image configuration: if it is accepted, a list can show it and a container can be made of it.

The bytes are changes of a valid document, as in :mod:`tests.fuzz.manifests`; the first ones choose a user and a signal.
"""

from __future__ import annotations

import json

from criserver.api import views
from criserver.errors import InvalidArgumentError
from criserver.images import Image
from criserver.images.manifests import parse_config
from criserver.model import MAX_ID
from criserver.oci.spec_inputs import ImageDefaults
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.container_create import signal_number
from tests.fuzz.manifests import VALID, changed

LONG = "1" * 5000
NUMBERS = ("", "0", "1000", "4294967294", "4294967295", "4294967296", LONG, "0" * 5000)
TEXTS = (*NUMBERS, "web", "-1", "+1", "²", "１", "\0")
USERS = (*TEXTS, *(f"{text}:{text}" for text in TEXTS), "u" * 5000, ":", "::", "a:b:c")
SIGNALS = (*TEXTS, "SIGTERM", "RTMIN+", "RTMIN+²", f"RTMAX-{LONG}", f"SIGRTMIN+{LONG}", "SIG_DFL", "RTMINX3")


def check(data: bytes) -> None:
    """The first byte chooses the user, the second the signal, the others what is changed."""
    if len(data) < 2:
        return
    document = json.loads(json.dumps(VALID[2]))
    document["config"]["User"] = USERS[data[0] % len(USERS)]
    document["config"]["StopSignal"] = SIGNALS[data[1] % len(SIGNALS)]
    document = changed(document, iter(data[2:]))
    try:
        found = parse_config(json.dumps(document).encode(), "it").process
    except InvalidArgumentError as e:
        assert len(str(e)) < 1000
        assert str(e).isprintable()
        return
    image = Image("sha256:", ("a:b",), (), 1, found, "", "", pinned=False)
    shown = cri.Image.FromString(views.image(image).SerializeToString())
    if shown.HasField("uid"):
        assert 0 <= shown.uid.value <= MAX_ID
    assert 1 <= signal_number(found.stop_signal) <= 64
    ImageDefaults(found.entrypoint, found.cmd, found.env, found.working_dir)
