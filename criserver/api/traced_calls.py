"""The last calls with their parts: the answer for `criserver trace`."""

from __future__ import annotations

import time

from criserver.errors import InvalidArgumentError, NotFoundError
from criserver.images.references import full_name
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.telemetry import spans
from criserver.telemetry.spans import Span, Trace
from criserver.text import printable, shown

_OF_IMAGES = frozenset({"PullImage", "RemoveImage"})


def traced_calls(subject: str) -> admin.TraceResponse:
    """The calls for a pod (NAMESPACE/NAME, or the beginning of its ID), a container or an image's name, or all for "".

    1. The pulls of its images are among them: those that the kubelet made for the pod, and those of a name that a
       container of it was created with.
    2. A pod or container that is removed is still found here.

    Raises NotFoundError without a call, and InvalidArgumentError where several IDs begin so.
    """
    calls = spans.traces()
    if subject:
        calls = _calls_for(subject, calls)
    return admin.TraceResponse(calls=[_message(call) for call in calls])


def _calls_for(subject: str, calls: list[Trace]) -> list[Trace]:
    image = full_name(subject)
    found = [call for call in calls if _is_for(subject, call) or _is_of_image(image, call)]
    if not found:
        raise NotFoundError(
            f"no call for {shown(subject)} is kept; `criserver trace` lists the calls, and they end with the daemon"
        )
    keys = ("sandbox", "container") if "/" not in subject else ()
    ids = {str(call.about[key]) for call in found for key in keys if str(call.about.get(key, "")).startswith(subject)}
    if len(ids) > 1:
        raise InvalidArgumentError(f"{shown(subject)} is the beginning of {len(ids)} IDs; give more characters")
    images = {call.about["reference"] for call in found if "reference" in call.about}
    # Only those of images that no pod was named for: the others are the pulls of other pods.
    pulls = [
        c for c in calls if c.method == "PullImage" and "pod" not in c.about and c.about.get("reference") in images
    ]
    wanted = {id(call) for call in (*found, *pulls)}
    return [call for call in calls if id(call) in wanted]


def _is_for(subject: str, call: Trace) -> bool:
    about = call.about
    if "/" in subject:
        return about.get("pod") == subject
    return any(str(about.get(key, "")).startswith(subject) for key in ("sandbox", "container"))


def _is_of_image(image: str, call: Trace) -> bool:
    """Whether a call pulled or removed the image with this full name."""
    return call.method in _OF_IMAGES and full_name(str(call.about.get("reference", ""))) == image


def _message(call: Trace) -> admin.TracedCall:
    now = time.monotonic() - call.began
    return admin.TracedCall(
        rpc=call.method,
        number=call.number,
        at=call.at,
        seconds=now if call.seconds is None else call.seconds,
        under_way=not call.is_complete,
        code=call.code,
        error=call.error,
        about={name: printable(str(value)) for name, value in call.about.items()},
        parts=[_part(part, now) for part in call.spans],
        dropped=call.dropped,
    )


def _part(part: Span, now: float) -> admin.TracedPart:
    return admin.TracedPart(
        name=printable(" ".join((part.operation.name, *part.values))),
        parent=part.parent,
        began=part.began,
        seconds=now - part.began if part.seconds is None else part.seconds,
        under_way=part.seconds is None,
        error=part.error,
    )
