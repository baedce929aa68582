"""A limit on the daemon's memory for the outputs of commands, over all ExecSync calls under way.

A pod's author chooses what a probe prints, and how many probes there are.

1. Each output may use OWN bytes. This is enough for the kubelet, which reads 10 KiB of a probe's output.
2. Beyond that all outputs share ROOM bytes.
3. One output may have MAX_OUTPUT bytes.

Output beyond these limits is dropped. The command and its exit code are not affected.
"""

from __future__ import annotations

# Bytes. The kubelet accepts a gRPC answer of 16 MiB, which holds two outputs of MAX_OUTPUT.
ROOM = 64 << 20
OWN = 64 << 10
MAX_OUTPUT = (8 << 20) - 1024


class OutputRoom:
    """The bytes of the shared memory that are left."""

    def __init__(self, size: int = ROOM) -> None:
        self.left = size

    def take(self, wanted: int) -> int:
        """Reserve up to ``wanted`` bytes. Return how many were reserved."""
        taken = min(wanted, self.left)
        self.left -= taken
        return taken

    def give_back(self, taken: int) -> None:
        self.left += taken


class Collected:
    """One output of a command. ``cut`` is true if a part of it was dropped."""

    def __init__(self, room: OutputRoom) -> None:
        self._room = room
        self._taken = 0
        self.data = bytearray()
        self.cut = False

    async def room(self) -> int:
        """The command never waits for room: output that is too much is dropped."""
        return MAX_OUTPUT

    async def write(self, data: bytes) -> None:
        reserved = OWN + self._taken - len(self.data)
        size = min(len(data), MAX_OUTPUT - len(self.data))
        if size > reserved:
            more = self._room.take(size - reserved)
            self._taken += more
            size = reserved + more
        self.data += memoryview(data)[:size]
        self.cut = self.cut or size < len(data)

    def release(self) -> None:
        """Give the shared bytes back. The caller must drop ``data`` soon, as it still occupies them."""
        self._room.give_back(self._taken)
        self._taken = 0
