"""Which calls `criserver trace` shows for a pod or container."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from criserver.api.traced_calls import traced_calls
from criserver.errors import InvalidArgumentError, NotFoundError
from criserver.telemetry import spans
from criserver.telemetry.operations import CNI
from criserver.telemetry.spans import Trace, within


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spans, "_kept", deque())
    yield


def kept(method: str, **about: object) -> Trace:
    trace = Trace("runtime.v1.RuntimeService", method, 1, about)
    with within(trace), CNI.timed("bridge", "ADD\x1b"):
        pass
    trace.answered("OK", "")
    return trace


def shown(subject: str) -> list[str]:
    return [call.rpc for call in traced_calls(subject).calls]


def test_a_pods_calls_and_the_pulls_of_its_images() -> None:
    kept("PullImage", reference="a:1")  # by crictl
    kept("PullImage", reference="a:1", pod="shop/other")
    kept("PullImage", reference="b:1", pod="shop/web")
    kept("PullImage", reference="c:1")
    kept("RunPodSandbox", pod="shop/web", sandbox="1234")
    kept("CreateContainer", pod="shop/web", sandbox="1234", container="5678", reference="a:1")
    kept("StopPodSandbox", pod="shop/other", sandbox="9999")
    assert shown("shop/web") == ["PullImage", "PullImage", "RunPodSandbox", "CreateContainer"]
    assert shown("12") == ["PullImage", "RunPodSandbox", "CreateContainer"]
    assert shown("5678") == ["PullImage", "CreateContainer"]
    assert len(shown("")) == 7
    (call,) = traced_calls("9999").calls
    assert call.parts[0].name == "CNI bridge ADD\\x1b"


def test_the_pulls_and_removals_of_an_image_by_any_form_of_its_name() -> None:
    kept("PullImage", reference="shop/web")  # by `criserver image pull`
    kept("PullImage", reference="docker.io/shop/web:latest", pod="shop/other")
    kept("RemoveImage", reference="shop/web:latest")
    kept("PullImage", reference="shop/web:2")
    kept("CreateContainer", pod="shop/other", sandbox="1234", container="5678", reference="shop/web")
    for name in ("shop/web", "shop/web:latest", "docker.io/shop/web"):
        assert shown(name) == ["PullImage", "PullImage", "RemoveImage"]
    assert shown("shop/web:2") == ["PullImage"]
    image = "sha256:" + 64 * "a"
    kept("RemoveImage", reference=image)
    assert shown(image) == ["RemoveImage"]


def test_an_unknown_and_an_ambiguous_subject() -> None:
    kept("RunPodSandbox", pod="shop/a", sandbox="12aa")
    kept("RunPodSandbox", pod="shop/b", sandbox="12bb")
    with pytest.raises(InvalidArgumentError, match="beginning of 2 IDs"):
        traced_calls("12")
    for subject in ("shop/none", "ff"):
        with pytest.raises(NotFoundError, match="no call"):
            traced_calls(subject)


def test_a_call_under_way_has_the_time_that_it_has_taken_by_now() -> None:
    trace = Trace("runtime.v1.RuntimeService", "RunPodSandbox", 1, {"pod": "shop/a"})
    with within(trace), CNI.timed("bridge", "ADD"):
        (call,) = traced_calls("shop/a").calls
        assert call.under_way
        assert call.parts[0].under_way
        assert call.seconds >= call.parts[0].seconds > 0
    trace.answered("OK", "")
    assert not traced_calls("shop/a").calls[0].under_way
