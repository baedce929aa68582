"""Platforms: operating system, architecture and variant, in Go's terms (OCI image-spec, image index, "platform")."""

from __future__ import annotations

import platform as host
from dataclasses import dataclass

from criserver.numbers import decimal

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}
_IMPLIED_VARIANTS = {"amd64": 1, "arm": 7, "arm64": 8}
# The 32-bit architecture that a 64-bit kernel runs too, if an image has nothing better.
_OLDER = {"amd64": ("386", ""), "arm64": ("arm", "v8")}
# What each level adds (x86-64 psABI, section 3.1.1, table 3.1), as the flags of /proc/cpuinfo.
_AMD64_LEVELS = {
    "v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "v3": {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"},
    "v4": {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
}
_MAX_VARIANT = 1000


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform that a program is built for."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        """As operators write it: ``linux/arm/v7``."""
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def host_platform() -> Platform:
    """The platform of this host."""
    machine = host.machine()
    architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
    if architecture == "amd64":
        with open("/proc/cpuinfo") as f:
            variant = amd64_variant(f.read())
    return Platform("linux", architecture, variant)


def amd64_variant(cpuinfo: str) -> str:
    """The level of an x86-64 processor, v2 to v4, by /proc/cpuinfo; "" for the first."""
    flags = next((line.partition(":")[2] for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()
    found = ""
    for variant, needed in _AMD64_LEVELS.items():
        if not needed.issubset(flags):
            break
        found = variant
    return found


def rank(image: Platform, platform: Platform) -> int:
    """How well a program for ``image`` suits ``platform``: -1 if it does not run, else from 1, higher is better."""
    if (image.os, image.architecture) == (platform.os, platform.architecture):
        own = _rank_variant(image, platform)
        return own if own < 0 else own + _MAX_VARIANT
    older = Platform(platform.os, *_OLDER.get(platform.architecture, ("", "")))
    return _rank_variant(image, older) if (image.os, image.architecture) == (older.os, older.architecture) else -1


def runs_on(image: Platform, platform: Platform) -> bool:
    """Whether a program for ``image`` runs on ``platform``."""
    return rank(image, platform) >= 0


def _rank_variant(image: Platform, platform: Platform) -> int:
    wanted, own = _variant(image), _variant(platform)
    if wanted is None or own is None:
        return 1 if image.variant == platform.variant else -1
    return wanted + 1 if wanted <= own else -1


def _variant(platform: Platform) -> int | None:
    """The number of a variant such as v8; None for one that is no number."""
    if not platform.variant:
        return _IMPLIED_VARIANTS.get(platform.architecture, 0)
    return decimal(platform.variant.removeprefix("v"), _MAX_VARIANT - 2)
