"""Builds the package, and generates the CRI messages from proto/ first."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def generate() -> None:
    """Write criserver/pb/ from proto/: modules and type stubs."""
    from grpc_tools import protoc

    target = ROOT / "criserver" / "pb"
    target.mkdir(exist_ok=True)
    sources = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    include = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    out = [f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", *out, *sources]):
        raise SystemExit("protoc failed")
    # These make packages instead of namespace packages. Tools that read imports do not find modules of the latter.
    for directory in (target, *(p for p in target.rglob("*") if p.is_dir() and p.name != "__pycache__")):
        (directory / "__init__.py").touch()


class BuildWithMessages(build_py):
    """build_py that generates the messages first."""

    def run(self) -> None:
        """Generate, then build. In a clean tree setuptools has listed the packages before these existed."""
        generate()
        found = (ROOT / "criserver/pb").rglob("__init__.py")
        made = {str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for path in found}
        self.packages = sorted(made.union(self.packages))
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithMessages})
