"""The sizes of huge pages that the kernel has."""

from __future__ import annotations

import os

from criserver.stats import kernel_text


def huge_page_sizes() -> list[str]:
    """The sizes of huge pages, as in the names of the hugetlb controller's files: "2MB", "1GB"."""
    sizes = []
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        return []
    for name in names:
        kilobytes = kernel_text.number(name.removeprefix("hugepages-").removesuffix("kB").encode())
        if kilobytes is not None:
            sizes.append(_size(kilobytes))
    return sizes


def _size(kilobytes: int) -> str:
    for unit, scale in (("GB", 1 << 20), ("MB", 1 << 10)):
        if kilobytes >= scale:
            return f"{kilobytes // scale}{unit}"
    return f"{kilobytes}KB"
