"""What the outputs of commands may occupy in the daemon's memory, all ExecSync calls under way together.

A pod's author chooses what a probe prints, and how many probes there are. Each output has a small part that is its own,
enough for whoever reads it (the kubelet takes 10 KiB of a probe's); beyond that all share one room. What finds none is
dropped, as what goes beyond the limit of one answer is: the command and its exit code are not affected.
"""

from __future__ import annotations

# Bytes: in common, of each output by itself, and of each at most: a gRPC answer of the kubelet's limit holds 16 MiB in
# all.
ROOM = 64 << 20
OWN = 64 << 10
MAX_OUTPUT = (8 << 20) - 1024


class OutputRoom:
    """The room that is left."""

    def __init__(self, size: int = ROOM) -> None:
        self.left = size

    def take(self, wanted: int) -> int:
        """Take up to ``wanted`` bytes of it; how many there were."""
        taken = min(wanted, self.left)
        self.left -= taken
        return taken

    def give_back(self, taken: int) -> None:
        self.left += taken


class Collected:
    """What a command has written to one of its outputs. ``cut`` is true where there was more than was kept."""

    def __init__(self, room: OutputRoom) -> None:
        self._room = room
        self._taken = 0
        self.data = bytearray()
        self.cut = False

    async def room(self) -> None:
        """What is too much is dropped."""

    async def write(self, data: bytes) -> None:
        most = OWN + self._taken - len(self.data)
        wanted = min(len(data), MAX_OUTPUT - len(self.data))
        if wanted > most:
            more = self._room.take(wanted - most)
            self._taken += more
            wanted = most + more
        self.data += memoryview(data)[:wanted]
        self.cut = self.cut or wanted < len(data)

    def release(self) -> None:
        """Give the room back; what was collected is the caller's to let go of soon."""
        self._room.give_back(self._taken)
        self._taken = 0
