"""Which images may be pulled: the place for a check of signatures.

The only policy that there is accepts every image. Another one is a class with :meth:`ImagePolicy.check`; the daemon
gives it to Images (criserver/daemon.py). Imported images are not checked.
"""

from __future__ import annotations

from typing import Protocol

from criserver.images.manifests import Descriptor
from criserver.images.references import Reference


class ImagePolicy(Protocol):
    """Decides for each pull whether it may go on."""

    async def check(self, reference: Reference, target: Descriptor) -> None:
        """Return if ``target`` may be pulled: the manifest or index that ``reference`` means at its registry.

        It is called when the digest is known, and nothing of the image but ``target`` is downloaded. Raises
        SignatureError if a signature is wrong or missing, and PermissionDeniedError for other reasons.
        """


class AcceptAll:
    """Accepts every image; signatures are not checked."""

    async def check(self, reference: Reference, target: Descriptor) -> None:
        """Accept the image."""
