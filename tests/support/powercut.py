"""A disk that a power cut takes: a real ext4 in a file, which loses what was not synced."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from pathlib import Path

from snapshotter import mounts

# Mount options with which a lost file has its right size, and zeros in it. By default it has no bytes.
RIGHT_SIZES = "data=writeback,nodelalloc"


class Disk:
    """An ext4 on the directory ``point``; ``base`` is the directory of its files."""

    def __init__(self, base: Path, point: str, options: str = "") -> None:
        self.point = point
        self._file = base / "disk"
        self._copy = base / "copy"
        self._options = ",".join(filter(None, ("loop", options)))
        with open(self._file, "wb") as file:
            file.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", self._file], check=True)
        os.makedirs(point, exist_ok=True)
        self._mount()

    def sync(self, *patterns: str) -> None:
        """Write the content of these files, as the kernel may have done by the time of the cut."""
        for pattern in patterns:
            for path in glob.glob(f"{self.point}/{pattern}"):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

    def commit_journal(self) -> None:
        """Write all names and sizes, as ext4 does every five seconds. Contents stay in the page cache."""
        with open(f"{self.point}/other", "w") as file:
            os.fsync(file.fileno())

    def cut(self) -> None:
        """Cut the power: :meth:`boot` brings back what is on the disk now. Nothing may use the disk between the two."""
        # The file system is not unmounted, which would write all.
        shutil.copyfile(self._file, self._copy)

    def boot(self) -> None:
        """Mount what was on the disk at the cut."""
        self.close()
        self._copy.rename(self._file)
        self._mount()

    def close(self) -> None:
        mounts.unmount(self.point)

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", self._options, self._file, self.point], check=True)
