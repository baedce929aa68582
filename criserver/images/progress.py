"""How far a pull is. It is read from what is on disk when a caller asks, and nothing is counted for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from criserver.images.content import ContentStore
from criserver.images.pull import Lease
from snapshotter import Snapshotter


class Stage(enum.Enum):
    """The stages of a layer, in order."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    UNPACKING = "unpacking"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """One layer of a pull: the digest of its blob, and how many of its ``size`` bytes are here."""

    digest: str
    size: int
    received: int
    stage: Stage


def progress(lease: Lease, content: ContentStore, snapshotter: Snapshotter) -> tuple[LayerProgress, ...]:
    """The layers of a load, the lowest first; () until they are known."""
    found = []
    for blob, chain_id in lease.plan:
        if content.size(blob.digest) is not None:
            stage = Stage.UNPACKING if snapshotter.layer(chain_id) is None else Stage.DONE
            found.append(LayerProgress(blob.digest, blob.size, blob.size, stage))
        else:
            received = content.arrived(blob.digest)
            stage = Stage.DOWNLOADING if received else Stage.WAITING
            found.append(LayerProgress(blob.digest, blob.size, received, stage))
    return tuple(found)
