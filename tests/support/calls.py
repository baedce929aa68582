"""A program for containers that makes single system calls and says what the kernel answers."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

X32 = 0x40000000
KILLED = -1000 - signal.SIGSYS

# calls CALL...: each CALL is words with commas between, [x86,]NUMBER,ARGUMENT,..., made in a process of its own that
# may die of it. A line for each: what the kernel returned, a negative error, or -1000 less the signal that ended it.
_CALLS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static long make(char *words) {
    int compat = !strncmp(words, "x86,", 4);
    unsigned long a[7] = {0};
    long result;
    char *word = strtok(compat ? words + 4 : words, ",");
    for (int i = 0; word && i < 7; i++, word = strtok(0, ","))
        a[i] = strtoul(word, 0, 0);
    if (compat) {
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(a[0]), "b"(a[1]), "c"(a[2]), "d"(a[3])
                         : "memory", "r8", "r9", "r10", "r11");
        return (int)result;
    }
    result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    return result == -1 ? -errno : result;
}
int main(int argc, char **argv) {
    long *result = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 1; i < argc; i++) {
        int status, child = fork();
        if (child < 0) return 1;
        if (!child) {
            *result = make(argv[i]);
            _exit(0);
        }
        if (waitpid(child, &status, 0) != child) return 1;
        printf("%ld\n", WIFSIGNALED(status) ? -1000L - WTERMSIG(status) : *result);
    }
    return 0;
}
"""


def build(source: str, path: Path) -> None:
    """Compile C into a static program at ``path``; the test is skipped where there is no compiler."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed, and nothing else makes these system calls")
    command = ["gcc", "-static", "-pthread", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)


def build_calls(path: Path) -> None:
    """Compile the program that :func:`arguments` is for."""
    build(_CALLS, path)


def arguments(calls: Sequence[Sequence[object]]) -> list[str]:
    """The program's arguments for ``calls``: each is (NUMBER, ARGUMENT, ...), or ("x86", NUMBER, ...) for int 0x80."""
    return [",".join(map(str, call)) for call in calls]


def numbers(bits: int) -> dict[str, int]:
    """The numbers of the calls of 64-bit or 32-bit x86, as the kernel's headers have them."""
    path = Path(f"/usr/include/x86_64-linux-gnu/asm/unistd_{bits}.h")
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    found = re.findall(r"^#define __NR_(\w+) (\d+)$", path.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}
