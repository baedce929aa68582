"""Which images may be pulled at all: the place for a check of signatures.

The daemon comes with no policy but one that takes every image. Another is a class with :meth:`ImagePolicy.check`, given
to Images where the daemon puts its rooms together. Images that the operator imports are not asked about.
"""

from __future__ import annotations

from typing import Protocol

from criserver.images.manifests import Descriptor
from criserver.images.references import Reference


class ImagePolicy(Protocol):
    """Says of every pull whether it may go on."""

    async def check(self, reference: Reference, target: Descriptor) -> None:
        """Return where the manifest or index ``target``, which ``reference`` means at its registry, may be pulled.

        Called when the digest is known and nothing of the image has been downloaded but ``target`` itself. Raises
        PermissionDeniedError, whose message begins with "SignatureValidationFailed: ", CRI's word, where a signature
        is what is wrong.
        """


class AcceptAll:
    """The policy that there is: signatures are not checked."""

    async def check(self, reference: Reference, target: Descriptor) -> None:
        """Return."""
