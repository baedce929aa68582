"""Builds the Debian package: ``make deb``.

The package contains its libraries, so a node without a network can install it. They are the wheels of
requirements-tracing.lock, checked by their hashes and unpacked below /usr/lib/criserver. The package is made for one
version of Python, which need not be the one that runs this program. Two runs with the same sources, lock and options
give the same bytes.
"""

from __future__ import annotations

import argparse
import email.message
import email.parser
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from itertools import accumulate
from pathlib import Path

import pages

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent
PRIVATE = "usr/lib/criserver"
DOC = "usr/share/doc/criserver"

# Debian's names of architectures, and those of wheels.
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
# The newest C library that a wheel may need (2.28). The field Depends in control has the same version.
GLIBC = 28

# The sources of the wheel. It contains nothing else of a working tree.
WHEEL_SOURCES = ("criserver", "shims", "snapshotter", "proto", "pyproject.toml", "setup.py", "README.md", "LICENSE")

# Files of the libraries that a node never uses: commands, tests, sources of compiled modules, and pip's records of the
# installation. zstandard's second backend is for other interpreters.
UNUSED = (
    "bin",
    "*/tests",
    "google/protobuf/testdata",
    "multidict/_testcapi.*",
    "zstandard/_cffi.*",
    "**/*.pyx",
    "**/*.pxd",
    "**/*.pxi",
    "**/*.c",
    "**/*.h",
    "*.dist-info/RECORD",
    "*.dist-info/INSTALLER",
    "*.dist-info/REQUESTED",
    "*.dist-info/direct_url.json",
)

# The files of contrib/ that are examples for operators.
EXAMPLES = ("crictl.yaml", "cni/10-bridge.conflist", "prometheus/criserver.rules.yml", "grafana/criserver.json")

# The places of the files in contrib/systemd and contrib/apparmor, by the end of their names.
PLACES: Mapping[str, Mapping[str, str]] = {
    "systemd": {
        ".service": "usr/lib/systemd/system/{name}",
        ".slice": "usr/lib/systemd/system/{name}",
        ".socket": "usr/lib/systemd/system/{name}",
        "tmpfiles.conf": "usr/lib/tmpfiles.d/criserver.conf",
        "modules-load.conf": "usr/lib/modules-load.d/criserver.conf",
        "sysctl.conf": "usr/lib/sysctl.d/60-criserver.conf",
    },
    "apparmor": {"": "etc/apparmor.d/{name}"},
}

# Where each shell looks for the completion of a package's command.
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/criserver",
    "fish": "usr/share/fish/vendor_completions.d/criserver.fish",
    "zsh": "usr/share/zsh/vendor-completions/_criserver",
}


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a build: for Python ``python`` ("3.11"), with Debian revision ``revision``, into ``output``."""

    python: str
    revision: str
    architecture: str
    compression: str
    output: Path
    epoch: int

    @property
    def version(self) -> str:
        """The package's version. A package for a newer Python has a newer version."""
        return f"{upstream_version()}-{self.revision}+py{self.python}"


def upstream_version() -> str:
    """criserver.__version__ in Debian's order, where only a tilde sorts before the end."""
    found = re.search(r'^__version__ = "(.+)"$', (SOURCE / "criserver/__init__.py").read_text(), re.MULTILINE)
    assert found is not None, "criserver/__init__.py has no __version__"
    return re.sub(r"\.?(a|b|rc|dev)(\d+)", r"~\1\2", found[1])


def build(options: Options) -> Path:
    """Build the package and return its path."""
    with tempfile.TemporaryDirectory(prefix="criserver-deb-") as scratch:
        tree = Path(scratch, "tree")
        libraries(options, tree / PRIVATE)
        own_wheel(options, Path(scratch, "wheel"), tree / PRIVATE)
        write(tree / DOC / "copyright", copyright_text(tree / PRIVATE))
        for pattern in UNUSED:
            for path in (tree / PRIVATE).glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files(options, tree)
        control(options, tree)
        settle(options, tree)
        options.output.mkdir(parents=True, exist_ok=True)
        package = options.output / f"criserver_{options.version}_{options.architecture}.deb"
        command = ["dpkg-deb", f"-Z{options.compression}", "--root-owner-group", "--build", str(tree), str(package)]
        subprocess.run(command, check=True, env=environment(options), stdout=subprocess.DEVNULL)
    return package


def libraries(options: Options, target: Path) -> None:
    """Unpack the locked wheels for the package's Python into ``target``."""
    machine = MACHINES[options.architecture]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 16, -1)] + [f"manylinux2014_{machine}"]
    pip(
        options,
        *("install", "--require-hashes", "--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(target)),
        *("--implementation", "cp", "--python-version", options.python),
        *(f"--platform={platform}" for platform in platforms),
        *("--requirement", str(SOURCE / "requirements-tracing.lock")),
    )


def own_wheel(options: Options, scratch: Path, target: Path) -> None:
    """Build criserver's own wheel from a copy of its sources, and unpack it into ``target``."""
    copy = scratch / "source"
    for name in WHEEL_SOURCES:
        if (SOURCE / name).is_dir():
            shutil.copytree(SOURCE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "pb"))
        else:
            shutil.copy(SOURCE / name, copy / name)
    pip(options, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch), str(copy))
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def files(options: Options, tree: Path) -> None:
    """Put everything but the libraries into the tree."""
    python = f"python{options.python}"
    write(tree / "usr/bin/criserver", filled(HERE / "criserver.in", python=python), executable=True)
    write(tree / "etc/criserver/config.toml", configuration())
    for directory, rules in PLACES.items():
        for path in sorted((SOURCE / "contrib" / directory).glob("*")):
            place = next((place for end, place in rules.items() if path.name.endswith(end)), None)
            if place is None:
                raise SystemExit(f"contrib/deb/build.py: no place is known for {path.relative_to(SOURCE)}")
            write(tree / place.format(name=path.name), path.read_text())
    compress(tree / "usr/share/man/man8/criserver.8.gz", (HERE / "criserver.8").read_text())
    defaults = (SOURCE / "criserver/config/default.toml").read_text()
    compress(tree / "usr/share/man/man5/criserver.toml.5.gz", pages.manual_page(defaults))
    compress(tree / DOC / "changelog.gz", (SOURCE / "CHANGELOG.md").read_text())
    compress(tree / DOC / "changelog.Debian.gz", changelog(options))
    for shell, place in COMPLETIONS.items():
        command = [sys.executable, "-m", "criserver", "completion", shell]
        done = subprocess.run(
            command, check=True, cwd=SOURCE, env=environment(options), stdout=subprocess.PIPE, text=True
        )
        write(tree / place, done.stdout)
    documents(tree)
    write(tree / "usr/share/lintian/overrides/criserver", (HERE / "lintian-overrides").read_text())


def documents(tree: Path) -> None:
    """Put README.md, SECURITY.md, docs/ and the examples into the tree. Links lead to files of the package."""
    texts = [SOURCE / "README.md", SOURCE / "SECURITY.md", *sorted((SOURCE / "docs").rglob("*.md"))]
    places = {}
    for path in texts:
        name = str(path.relative_to(SOURCE))
        places[name] = f"{DOC}/{name.removeprefix('docs/')}"
    places["CHANGELOG.md"] = f"{DOC}/changelog.gz"
    places["LICENSE"] = f"{DOC}/copyright"
    places["contrib/systemd/criserver.service"] = "usr/lib/systemd/system/criserver.service"
    for example in EXAMPLES:
        places[f"contrib/{example}"] = f"{DOC}/examples/{Path(example).name}"
        write(tree / DOC / "examples" / Path(example).name, (SOURCE / "contrib" / example).read_text())
    for drawing in sorted((SOURCE / "docs").rglob("*.svg")):
        places[str(drawing.relative_to(SOURCE))] = f"{DOC}/{drawing.name}"
        write(tree / DOC / drawing.name, drawing.read_text())
    for path in texts:
        name = str(path.relative_to(SOURCE))
        write(tree / places[name], pages.linked(path.read_text(), name, places))


def configuration() -> str:
    """The configuration file: every key is a comment but the cgroup driver, as systemd starts the daemon."""
    kept = {"cgroup_driver": 'cgroup_driver = "systemd"'}
    lines = []
    handlers = False
    for line in (SOURCE / "criserver/config/default.toml").read_text().splitlines():
        key = line.partition(" = ")[0]
        handlers = handlers or line.startswith("[runtimes.")
        if not line or line.startswith("#") or (line.startswith("[") and not handlers):
            lines.append(line)
        else:
            lines.append(kept.get(key, "#" + line))
    return "\n".join(lines) + "\n"


def control(options: Options, tree: Path) -> None:
    """Write the control directory: fields, maintainer scripts, conffiles, checksums."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    size = sum(-(-path.stat().st_size // 1024) for path in paths) + sum(1 for path in tree.rglob("*") if path.is_dir())
    fields = {
        "version": options.version,
        "architecture": options.architecture,
        "maintainer": maintainer(),
        "size": str(size),
        "python": f"python{options.python}",
        "glibc": f"2.{GLIBC}",
    }
    write(tree / "DEBIAN/control", filled(HERE / "control.in", **fields))
    for name in ("postinst", "prerm", "postrm"):
        write(tree / "DEBIAN" / name, filled(HERE / f"{name}.in", python=fields["python"]), executable=True)
    names = [str(path.relative_to(tree)) for path in paths]
    write(tree / "DEBIAN/conffiles", "".join(f"/{name}\n" for name in names if name.startswith("etc/")))
    sums = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {name}\n" for path, name in zip(paths, names, strict=True))  # noqa: S324 - dpkg's format
    write(tree / "DEBIAN/md5sums", "".join(sums))


def settle(options: Options, tree: Path) -> None:
    """Set the mode and time of every file of the tree, so that they do not depend on the builder."""
    for path in (tree, *tree.rglob("*")):
        executable = path.is_dir() or (path.parent.name in ("bin", "DEBIAN") and path.stat().st_mode & stat.S_IXUSR)
        path.chmod(0o755 if executable else 0o644)
        os.utime(path, (options.epoch, options.epoch))


def changelog(options: Options) -> str:
    """Debian's changelog. It has one entry, because the packaging has no history of its own."""
    return (
        f"criserver ({options.version}) unstable; urgency=medium\n\n"
        f"  * Packaged from the project's own sources; changelog.gz says what is new.\n\n"
        f" -- {maintainer()}  {formatdate(options.epoch)}\n"
    )


def copyright_text(private: Path) -> str:
    """The licences of criserver and of each library in the package, in Debian's machine-readable form.

    A compiled library may have code of other projects in it. A wheel with Rust crates lists them itself. The file
    copyright-parts.in has the others.
    """
    paragraphs = [(HERE / "copyright.in").read_text().rstrip()]
    records = {
        found: [line.partition(",")[0] for line in (found / "RECORD").read_text().splitlines()]
        for found in sorted(private.glob("*.dist-info"))
    }
    for found, record in records.items():
        meta = email.parser.Parser().parsestr((found / "METADATA").read_text(), headersonly=True)
        if meta["Name"] == "criserver":
            continue
        others = {name for other, names in records.items() if other != found for name in names}
        tops = own_paths(record, others)
        texts = sorted(p for p in found.rglob("*") if p.is_file() and re.match(r"(?i)licen|copying", p.name))
        paragraphs.append(
            "Files: "
            + "\n ".join(f"{PRIVATE}/{top}" + ("/*" if (private / top).is_dir() else "") for top in tops)
            + f"\nCopyright: the authors of {meta['Name']} {meta['Version']}\nLicense: {_license(meta)}\n"
            + "".join(f" The text is in /{PRIVATE}/{text.relative_to(private)}\n" for text in texts)
            + _crates(found)
        )
    paragraphs.append((HERE / "copyright-parts.in").read_text())
    return "\n\n".join(p.rstrip() for p in paragraphs) + "\n"


def _crates(wheel: Path) -> str:
    """The field Comment with the Rust crates in a wheel, by its bill of materials (CycloneDX); "" without crates."""
    lines = []
    for path in sorted(wheel.glob("sboms/*.cyclonedx.json")):
        for crate in json.loads(path.read_text())["components"]:
            licences = " and ".join(one["expression"] for one in crate["licenses"])
            author = f", by {crate['author']}" if crate.get("author") else ""
            lines.append(f"\n {crate['name']} {crate['version']}: {licences}{author}")
    return (
        "Comment: It is made of these crates, for which the word MIT is Expat:" + "".join(lines) + "\n" if lines else ""
    )


def own_paths(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest paths that have all files ``names`` of a library below them, and no files of the others.

    Several libraries have files in one directory, such as google and opentelemetry.
    """
    foreign = {prefix for name in others for prefix in accumulate(name.split("/"), "{}/{}".format)}
    found = set()
    for name in names:
        if not name.startswith(("../", "bin/")):
            found.add(next((p for p in accumulate(name.split("/"), "{}/{}".format) if p not in foreign), name))
    return sorted(found)


def _license(meta: email.message.Message) -> str:
    """A library's licence in its metadata: an expression, a short text, or a classifier."""
    words = meta["License-Expression"] or meta["License"] or ""
    if not words or "\n" in words or len(words) > 60:
        classifiers = meta.get_all("Classifier") or []
        words = next((c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")), "see its text")
    return re.sub(r"\s+", "-", words)


def maintainer() -> str:
    """The package's builder, from the variables of Debian's tools; the project's name without them."""
    return f"{os.environ.get('DEBFULLNAME', 'criserver')} <{os.environ.get('DEBEMAIL', 'criserver@localhost')}>"


def filled(path: Path, **values: str) -> str:
    """A template with its @NAMES@ filled in."""
    text = path.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name.upper()}@", value)
    left = re.search(r"@[A-Z]+@", text)
    assert left is None, f"{path}: {left and left[0]} is left"
    return text


def write(path: Path, text: str, *, executable: bool = False) -> None:
    """Write a file of the tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if executable else 0o644)


def compress(path: Path, text: str) -> None:
    """Write a file of the tree that Debian's policy wants compressed, without a time in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def pip(options: Options, *words: str) -> None:
    """Run pip. Its output is shown if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, check=False, env=environment(options), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"contrib/deb/build.py: pip {words[0]} failed:\n{done.stdout}{done.stderr}")


def environment(options: Options) -> dict[str, str]:
    """The environment of the programs that make files."""
    return {**os.environ, "SOURCE_DATE_EPOCH": str(options.epoch), "PYTHONDONTWRITEBYTECODE": "1"}


def default_epoch() -> int:
    """The time of all files: SOURCE_DATE_EPOCH, else the time of the last commit, else now."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "-C", str(SOURCE), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else int(time.time())


def native_architecture() -> str:
    """Debian's name of this machine's architecture."""
    return subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()


def parse(argv: list[str]) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the Debian package.")
    parser.add_argument(
        "--python", default="{}.{}".format(*sys.version_info), help="such as 3.11 (Debian 12), 3.13 (13)"
    )
    parser.add_argument("--revision", default="1", help="Debian revision: a higher one is an upgrade")
    parser.add_argument("--architecture", default=native_architecture(), choices=sorted(MACHINES))
    parser.add_argument("--compression", default="xz", choices=("xz", "gzip", "none"))
    parser.add_argument("--output", type=Path, default=SOURCE / "dist", help="the directory for the package")
    given = parser.parse_args(argv)
    if not re.fullmatch(r"3\.[0-9]+", given.python):
        parser.error(f"--python {given.python}: it must be like 3.13")
    if not re.fullmatch(r"[0-9][A-Za-z0-9+.~]*", given.revision):
        parser.error(f"--revision {given.revision}: it must begin with a digit; letters, digits, '+', '.', '~' follow")
    return Options(given.python, given.revision, given.architecture, given.compression, given.output, default_epoch())


if __name__ == "__main__":
    print(build(parse(sys.argv[1:])))
