"""The releases that were made, and what the virtual machine installs: the present package, and one to upgrade from."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import tempfile

# The version of each release and its commit, the newest last. RELEASE.md says when one is added.
RELEASES = {
    "0.1.0": "213e8f68d8c9f37927f30a83bab9bb4da5664893",
    "0.2.0": "5cd90d1876b4365169e105b96df391f8c5d28e38",
}
LAST = list(RELEASES)[-1]

PRESENT_PACKAGE = "criserver.deb"
RELEASED_PACKAGE = f"criserver-{LAST}.deb"
# Takes the place of the last release's where the clone has not its commit.
EARLIER_PACKAGE = "earlier.deb"
NO_HISTORY = f"this clone has not commit {RELEASES[LAST][:7]} of {LAST}; `git fetch --unshallow` brings it"


class BuildError(Exception):
    """A package cannot be built."""


def packages(project: str, python: str) -> dict[str, bytes]:
    """The packages for a version of Python, by file name. Raises BuildError.

    They are the one of the work tree ``project``, and one that it upgrades: the last release's, or another build of the
    work tree where the clone has not the release's commit.
    """
    found = {PRESENT_PACKAGE: build(project, python, "2")}
    commit = RELEASES[LAST]
    if has(project, commit):
        with tempfile.TemporaryDirectory(prefix="criserver-vm-") as source:
            archive = subprocess.run(["git", "-C", project, "archive", commit], capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
            found[RELEASED_PACKAGE] = build(source, python, "1")
    else:
        found[EARLIER_PACKAGE] = build(project, python, "1")
    return found


def has(project: str, commit: str) -> bool:
    """Whether the clone has the files of a commit."""
    command = ["git", "-C", project, "cat-file", "-e", f"{commit}^{{tree}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build(source: str, python: str, revision: str) -> bytes:
    """The Debian package of the sources in a directory."""
    with tempfile.TemporaryDirectory(prefix="criserver-vm-") as output:
        command = [sys.executable, f"{source}/contrib/deb/build.py", "--python", python, "--revision", revision]
        command += ["--compression", "none", "--output", output]
        # A directory without a history has no commit whose time the files could have.
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise BuildError(f"the package of {source} cannot be built:\n{done.stdout}{done.stderr}")
        (path,) = glob.glob(f"{output}/*.deb")
        with open(path, "rb") as f:
            return f.read()
