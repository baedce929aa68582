"""Images: from the reference in a pod's description to unpacked layers, and their removal.

This room has references, registries, archives, the content store, image records and garbage collection. It knows
nothing of pods and containers.
"""

from __future__ import annotations

from criserver.images.content import ContentStore
from criserver.images.credentials import Credentials
from criserver.images.image import FsUsage, Image, LeftOut, Pruned
from criserver.images.manifests import ImageConfig
from criserver.images.node_images import Images
from criserver.images.platforms import Platform, host_platform
from criserver.images.policy import ImagePolicy
from criserver.images.progress import LayerProgress, Stage
from criserver.images.references import Reference, parse
from criserver.images.registry_settings import RegistrySettings
from criserver.images.verify import Damage, Verified

__all__ = [
    "ContentStore",
    "Credentials",
    "Damage",
    "FsUsage",
    "Image",
    "ImageConfig",
    "ImagePolicy",
    "Images",
    "LayerProgress",
    "LeftOut",
    "Platform",
    "Pruned",
    "Reference",
    "RegistrySettings",
    "Stage",
    "Verified",
    "host_platform",
    "parse",
]
