"""``criserver pod``: what an operator does with one pod of a running daemon and crictl cannot do."""

from __future__ import annotations

import argparse
import sys

from criserver.cli.client import connected, method
from criserver.cli.options import configuration
from criserver.pb.criserver.v1 import admin_pb2 as admin

_ADMIN = admin.DESCRIPTOR.services_by_name["AdminService"]


def remove(options: argparse.Namespace) -> int:
    """End and remove a pod. Raises CriError with the daemon's error if that refuses or does not answer."""
    with connected(configuration(options).grpc_address) as channel:
        removed = method(channel, _ADMIN, "RemovePod")(admin.RemovePodRequest(id=options.id, force=options.force))
    for words in removed.left:
        print(f"warning: its network plugins did not clean up: {words}", file=sys.stderr)
    print(f"removed {removed.id}")
    return 0
