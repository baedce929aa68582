"""Platforms: operating system, architecture and variant, in Go's terms (OCI image-spec, image index, "platform")."""

from __future__ import annotations

import platform as host
from dataclasses import dataclass, replace

# Other names of Go's architectures, with the variant that the name itself says: those of uname(2), of Debian's ports,
# and those that containerd accepts (containerd/platforms, "database").
_ALIASES = {
    "aarch64": ("arm64", ""),
    "armel": ("arm", "v6"),
    "armhf": ("arm", "v7"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
    "ppc64el": ("ppc64le", ""),
    "x86-64": ("amd64", ""),
    "x86_64": ("amd64", ""),
}
_CPU_INFO = "/proc/cpuinfo"
_SYSTEMS = {"": "linux", "macos": "darwin"}
# The levels of variants by architecture; "" is the variant that a platform without one has. A later level runs what an
# earlier one runs. A minor version of arm64 is one level.
_LEVELS: dict[str, dict[str, int]] = {
    "amd64": {"": 1, **{str(n): n for n in range(1, 5)}},
    "arm": {"": 7, **{str(n): n for n in range(5, 9)}},
    "arm64": {
        "": 80,
        **{str(n): 10 * n for n in (8, 9)},
        **{f"{major}.{minor}": 10 * major + minor for major in (8, 9) for minor in range(10)},
    },
}
_ARM64_V9 = 90
_ARM64_V9_RUNS = 5  # v9.0 has what v8.5 has, v9.1 what v8.6 has, and so on
# The 32-bit architecture that a 64-bit kernel runs too, if an image has nothing better.
_OLDER = {"amd64": ("386", ""), "arm64": ("arm", "v8")}
# What each level adds (x86-64 psABI, section 3.1.1, table 3.1), as the flags of /proc/cpuinfo.
_AMD64_LEVELS = {
    "v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "v3": {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"},
    "v4": {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
}
_OWN_ARCHITECTURE = 1000


@dataclass(frozen=True, slots=True)
class Platform:
    """The platform that a program is built for."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        """As operators write it: ``linux/arm/v7``."""
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def normalized(os: str, architecture: str, variant: str = "") -> Platform:
    """The platform with the names that Go has for it: ``x86_64`` is ``amd64``, ``armhf`` is ``arm/v7``.

    Names have no case. No operating system is Linux. No architecture stays none: :func:`rank` takes it for any.
    """
    system, machine, level = os.lower(), architecture.lower(), variant.lower()
    known, said = _ALIASES.get(machine, (machine, level))
    return Platform(_SYSTEMS.get(system, system), known, said or level)


def host_platform() -> Platform:
    """The platform of this host."""
    found = normalized("linux", host.machine())
    if found.architecture == "amd64":
        with open(_CPU_INFO, errors="replace") as f:  # a virtual machine may give its processor any name
            return replace(found, variant=amd64_variant(f.read()))
    return found


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
    """How well a program for ``image`` suits ``platform``: -1 if it does not run, else from 0, higher is better.

    1. 0 is for an image that names no architecture.
    2. A variant that the architecture does not have says nothing. Such an image comes after those with a real one.
    """
    if image.os != platform.os:
        return -1
    if not image.architecture:
        return 0
    if image.architecture == platform.architecture:
        own = _rank_variant(image, platform)
        return own if own < 0 else own + _OWN_ARCHITECTURE
    older = Platform(platform.os, *_OLDER.get(platform.architecture, ("", "")))
    return _rank_variant(image, older) if image.architecture == older.architecture else -1


def runs_on(image: Platform, platform: Platform) -> bool:
    """Whether a program for ``image`` runs on ``platform``."""
    return rank(image, platform) >= 0


def _rank_variant(image: Platform, platform: Platform) -> int:
    wanted, own = _level(image), _level(platform)
    if wanted is None or own is None:
        return 2 if image.variant == platform.variant else 1
    if image.architecture == "arm64" and wanted < _ARM64_V9 <= own:
        own = own - _ARM64_V9 + _LEVELS["arm64"]["8"] + _ARM64_V9_RUNS
    return wanted + 2 if wanted <= own else -1


def _level(platform: Platform) -> int | None:
    """The level of a variant such as v8; None for one that the architecture does not have."""
    return _LEVELS.get(platform.architecture, {}).get(platform.variant.removeprefix("v"))
