"""The fixtures of the end-to-end tests, for crictl, critest and the kubelet."""

from __future__ import annotations

from tests.support.fixtures import busybox_archive, clean_pods, node, nothing_left
from tests.support.registry import registry

__all__ = ["busybox_archive", "clean_pods", "node", "nothing_left", "registry"]
