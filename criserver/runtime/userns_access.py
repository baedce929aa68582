"""Access for the root user of a user namespace to the root file systems of its pod's containers.

Only root may enter the state directory. But an OCI runtime mounts a container's root file system as the root user of
the container's user namespace, which is an ordinary user on the node. So the access control lists of the directories on
the path have an entry for each such user, for as long as its pod runs.
"""

from __future__ import annotations

import errno
import os

from criserver.errors import FailedPreconditionError
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from snapshotter import acl, files


def update(node: Node, *, leaving: str = "") -> None:
    """Set the entries: one for each pod with a user namespace that is being made or runs, except the pod ``leaving``.

    All other entries are removed.
    Raises FailedPreconditionError if the state directory is on a file system without access control lists.
    """
    wanted = {
        sandbox.config.namespaces.user.uids.host_id
        for sandbox in node.records.sandboxes.values()
        if sandbox.config.namespaces.user is not None
        and sandbox.id != leaving
        and sandbox.state in (SandboxState.CREATING, SandboxState.READY)
    }
    containers = os.path.join(node.config.state, "containers")
    files.make_private(containers)
    for directory in (node.config.state, containers):
        if acl.users(directory) == wanted:
            continue
        try:
            acl.let_pass(directory, wanted)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            raise FailedPreconditionError(
                f"{directory} is on a file system without access control lists, which pods with user namespaces need; "
                "configure a state directory on a tmpfs"
            ) from e
