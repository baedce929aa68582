"""The disk of the virtual machine, made from Debian's packages and kept between runs by what goes into it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

STABLE = "trixie"
NEWER = "sid"  # where the runtimes of tomorrow come from: see guest/customize.sh

PACKAGES = """
    apparmor apparmor-utils busybox-static ca-certificates catatonit conntrack containernetworking-plugins dbus
    docker-registry ethtool iproute2 iptables kmod libgcc-s1 libstdc++6 linux-image-cloud-amd64 nftables procps python3
    python3-venv runc selinux-policy-default skopeo socat sudo systemd systemd-sysv udev util-linux
""".split()

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(os.path.dirname(HERE))
LOCK = f"{PROJECT}/requirements-dev.lock"
LEFT_OUT = ("atheris", "mypy", "ruff", "types-", "librt", "mypy-extensions", "pathspec")
PYTHON = "3.13"  # of STABLE

DAYS = 30  # an image's age at which it is made anew, for the newer suite's sake
KEPT = 3  # images in the cache: those of the branches that one works on
ROOM = 6 << 30  # bytes that the guest may write beside what is installed; the file is sparse
SCRATCH = 3 << 30  # bytes that making an image needs


class ImageError(Exception):
    """The disk cannot be made here."""


@dataclass(frozen=True)
class Image:
    """``disk``: a raw ext4 file system without a partition table; ``kernel``: what QEMU boots it with."""

    disk: str
    kernel: str


def cache_directory() -> str:
    """Where images stay between runs: $CRISERVER_VM_CACHE, else below $XDG_CACHE_HOME, else below /var/cache."""
    return os.environ.get("CRISERVER_VM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "/var/cache"), "criserver-vm"
    )


def image() -> Image:
    """The image of today's recipe, made if the cache has none. Raises ImageError."""
    directory = f"{cache_directory()}/image-{_recipe()}"
    found = Image(disk=f"{directory}/root.ext4", kernel=f"{directory}/vmlinuz")
    if os.path.exists(directory) and os.stat(directory).st_mtime > time.time() - DAYS * 86400:
        return found
    os.makedirs(cache_directory(), mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache_directory()) as new:
        _build(new)
        images = sorted(glob.glob(f"{cache_directory()}/image-*"), key=lambda path: os.stat(path).st_mtime)
        for old in images:
            if old == directory or old not in images[1 - KEPT :]:
                shutil.rmtree(old)
        os.rename(new, directory)
        os.mkdir(new)  # for TemporaryDirectory, which removes it
    return found


def _recipe() -> str:
    """A digest of all that decides what the image holds, but for the packages' versions."""
    digest = hashlib.sha256(repr((STABLE, NEWER, PACKAGES, PYTHON, LEFT_OUT, ROOM)).encode())
    for path in sorted(glob.glob(f"{HERE}/guest/*")):
        with open(path, "rb") as f:
            digest.update(os.path.basename(path).encode() + b"\0" + hashlib.sha256(f.read()).digest())
    digest.update(_locked().encode())
    return digest.hexdigest()[:24]


def _locked() -> str:
    """The part of the project's lock that the tests need."""
    with open(LOCK) as f:
        entries = re.split(r"^(?=[a-z0-9])", f.read(), flags=re.MULTILINE)
    return "".join(entry for entry in entries if re.match(r"[a-z0-9]", entry) and not entry.startswith(LEFT_OUT))


def mirror() -> str:
    """Where this host has its own Debian packages from. Raises ImageError."""
    release = platform.freedesktop_os_release()
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        uri, codename = line.split()
        if release.get("ID") == "debian" and codename == release.get("VERSION_CODENAME"):
            return uri
    raise ImageError("no mirror of Debian's packages in the configuration of apt: this needs a Debian host")


def _apt_options() -> list[str]:
    """What this host's apt thinks of a mirror that lags behind or a clock that does: mmdebstrap's options."""
    found = []
    for key in ("Acquire::Check-Valid-Until", "Acquire::Check-Date"):
        value = subprocess.run(
            ["apt-config", "shell", "v", key], capture_output=True, text=True, check=True
        ).stdout.strip()
        if value:
            found.append(f"--aptopt={key} {value.removeprefix('v=').replace(chr(39), chr(34))}")
    return found


def _build(target: str) -> None:
    """Make the disk and the kernel in ``target``."""
    if os.geteuid() != 0:
        raise ImageError("the image cannot be made: mmdebstrap needs root to make its files those of root")
    uri, log = mirror(), f"{target}/build.log"
    with _scratch() as scratch:
        root, stage = f"{scratch}/root", f"{scratch}/stage"
        os.mkdir(stage)
        _download_wheels(f"{stage}/wheels", log)
        for path in glob.glob(f"{HERE}/guest/*"):
            shutil.copy(path, stage)
        _run(
            [
                "mmdebstrap",
                "--quiet",
                "--mode=root",
                "--variant=minbase",
                f"--include={','.join(PACKAGES)}",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                *_apt_options(),
                f"--customize-hook=copy-in {stage} /",
                f'--customize-hook=chroot "$1" sh -eu /stage/customize.sh {uri} {NEWER}',
                STABLE,
                root,
                f"deb {uri} {STABLE} main",
            ],
            log,
        )
        (kernel,) = glob.glob(f"{root}/boot/vmlinuz-*")
        shutil.copyfile(kernel, f"{target}/vmlinuz")
        for path in (*glob.glob(f"{root}/boot/initrd*"), *glob.glob(f"{root}/boot/System.map*")):
            os.unlink(path)  # the kernel has the disk's driver built in
        used = int(subprocess.run(["du", "-sb", root], capture_output=True, check=True).stdout.split()[0])
        size = (used * 5 // 4 + ROOM) >> 20
        _run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, f"{target}/root.ext4", f"{size}M"],
            log,
        )


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A directory for tens of thousands of small files: in memory where there is enough."""
    place = "/dev/shm"
    status = os.statvfs(place)
    if status.f_bavail * status.f_frsize < SCRATCH:
        place = cache_directory()
    with tempfile.TemporaryDirectory(prefix="criserver-vm-", dir=place) as directory:
        yield directory


def _download_wheels(wheels: str, log: str) -> None:
    """The wheels of the lock for the guest's Python."""
    os.mkdir(wheels)
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as lock:
        lock.write(_locked())
        lock.flush()
        machine = platform.machine()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "-r", lock.name, "-d", wheels, "--only-binary=:all:"]
        command += ["--implementation=cp", f"--python-version={PYTHON}"]
        command += [f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")]
        command += [f"--platform={tag}_{machine}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
        _run([*command, "--platform=any"], log)


def _run(command: list[str], log: str) -> None:
    """Run to success, or raise ImageError with the end of the output."""
    with open(log, "ab") as out:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False).returncode
    if code != 0:
        with open(log, errors="replace") as f:
            raise ImageError(f"{command[0]} ended with {code}:\n{f.read()[-3000:]}")
