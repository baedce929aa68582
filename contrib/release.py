"""``make release VERSION=0.2.0``: writes the version, dates the changelog, and keeps the records of the release.

RELEASE.md has the steps before and after it. Nothing is committed here.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
VERSION = re.compile(r'^__version__ = "(\d+)\.(\d+)\.(\d+)"$', re.MULTILINE)
UNRELEASED = "## Unreleased\n"


def prepare(version: str, root: Path, today: datetime.date) -> None:
    """Change criserver/__init__.py and CHANGELOG.md below ``root``. Exits with the reason if they do not allow it."""
    module, changelog = root / "criserver/__init__.py", root / "CHANGELOG.md"
    code, changes = module.read_text(), changelog.read_text()
    given = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
    if given is None:
        sys.exit(f"VERSION={version}: it must be three numbers, such as 0.2.0")
    present = VERSION.search(code)
    if present is None:
        sys.exit(f'{module}: it has no line like __version__ = "X.Y.Z"')
    if [int(n) for n in given.groups()] <= [int(n) for n in present.groups()]:
        sys.exit(f"VERSION={version}: it must be newer than {'.'.join(present.groups())}, the present version")
    _, found, after = changes.partition(UNRELEASED)
    if not found or not after.partition("\n## ")[0].strip():
        sys.exit("CHANGELOG.md: there is nothing below Unreleased, so there is nothing to release")
    module.write_text(VERSION.sub(f'__version__ = "{version}"', code))
    changelog.write_text(changes.replace(UNRELEASED, f"{UNRELEASED}\n## {version} ({today.isoformat()})\n", 1))


if __name__ == "__main__":
    prepare(sys.argv[1], SOURCE, datetime.datetime.now(datetime.UTC).date())
    subprocess.run([sys.executable, "-m", "tests.support.records", sys.argv[1]], check=True, cwd=SOURCE)
