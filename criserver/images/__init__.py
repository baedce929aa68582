"""Images: from a reference in a pod's description to unpacked layers, and their end.

References, registries and archives, the content store, image records and garbage collection. Depends on store/,
the snapshotter and the errors; knows nothing of pods and containers.
"""

from __future__ import annotations

from criserver.images.auth import Credentials
from criserver.images.content import ContentStore
from criserver.images.images import FsUsage, Image, Images
from criserver.images.manifests import ImageConfig, Platform, host_platform
from criserver.images.references import Reference, parse

__all__ = [
    "ContentStore",
    "Credentials",
    "FsUsage",
    "Image",
    "ImageConfig",
    "Images",
    "Platform",
    "Reference",
    "host_platform",
    "parse",
]
