"""The tries: each does something that containers need. It returns None if that works, and otherwise the reason.

A try makes mounts and interfaces in namespaces of a thread. The kernel removes them when the thread ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import secrets
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from criserver.config import Config, RuntimeHandler
from criserver.errors import CriError
from criserver.network import Network
from criserver.oci.infra_spec import build_infra
from criserver.oci.spec_inputs import PodFacts
from criserver.runtime import cgroups, host
from criserver.runtime import features as runtime_features
from criserver.runtime.oci_runtime import OciRuntime
from criserver.runtime.runtime_choice import runtime_of
from snapshotter import Snapshotter, mounts, removal

_T = TypeVar("_T")

_CLONE_NEWNET = 0x40000000
_SECONDS = 20.0
_TIME_ERROR = 5  # adjtimex(2)


def missing_calls() -> list[str]:
    """The system calls of the daemon that the kernel does not have, or that a filter on this process forbids."""
    found = []
    try:
        os.close(mounts.openat2(mounts.AT_FDCWD, "/", os.O_PATH, mounts.RESOLVE_IN_ROOT))
    except OSError:
        found.append("openat2")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        found.append("pidfd_open")
    try:
        os.close(os.memfd_create("check"))
    except OSError:
        found.append("memfd_create")
    return found


def overlay(directory: str) -> str | None:
    """Whether an overlay can be mounted in ``directory``, and files of an image be replaced and deleted in it."""
    return _in_scratch(directory, _overlay)


def _overlay() -> str | None:
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(name, 0o755)
    with open("lower/file", "w"):
        pass
    os.mkdir("lower/directory")
    try:
        # The options of snapshots. "volatile" needs Linux 5.10.
        options = "lowerdir=lower,upperdir=upper,workdir=work,index=off,volatile"
        mounts.mount("overlay", "merged", "overlay", 0, options)
    except OSError as e:
        if e.errno == errno.ENODEV:
            return "the kernel has no overlay file system"
        return f"overlay cannot be mounted ({e.strerror}): it needs Linux 5.10 and a file system that supports it"
    try:
        try:
            os.unlink("merged/file")
            os.rmdir("merged/directory")
            os.mkdir("merged/directory")
            listed = os.listdir("merged")
        except OSError as e:
            return f"files of images cannot be replaced there ({e.strerror})"
        if "file" in listed:
            return "deleted files of images stay in lists of directories, as it does not have the types of files there"
    finally:
        mounts.umount2("merged", mounts.MNT_DETACH)
    return None


def idmap(directory: str) -> str | None:
    """Whether the file system of ``directory`` supports id-mapped mounts, which pods with user namespaces need."""
    return _in_scratch(directory, _idmap)


def _idmap() -> str | None:
    async def ask() -> str | None:
        snapshotter = Snapshotter(os.path.abspath("snapshots"))
        try:
            return await snapshotter.idmap_trouble() or None
        finally:
            snapshotter.close()

    return asyncio.run(ask())


def link(kind: str) -> str | None:
    """Whether the kernel can make network interfaces of this kind (rtnetlink(7)). It loads the module if needed."""

    def work() -> str | None:
        mounts.unshare(_CLONE_NEWNET)
        name = kind.encode() + b"\0"
        info = _attribute(18, _attribute(1, name))  # IFLA_LINKINFO, IFLA_INFO_KIND
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + info
        # RTM_NEWLINK; NLM_F_REQUEST, ACK, CREATE, EXCL
        message = struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
            netlink.settimeout(_SECONDS)
            netlink.send(message)
            answer = netlink.recv(65536)
        number = -struct.unpack_from("=i", answer, 16)[0]
        # Some kinds need a parent interface and fail with another error. The kernel has them.
        return os.strerror(number) if number == errno.EOPNOTSUPP else None

    return _in_thread(work)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def iptables(program: str) -> str | None:
    """Whether the program works with this kernel, in a network namespace without rules."""

    def work() -> str | None:
        mounts.unshare(_CLONE_NEWNET)
        done = subprocess.run(
            [program, "-w", "5", "-t", "nat", "-S"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        return _last(done.stderr) if done.returncode else None

    return _in_thread(work)


def version(program: str) -> str | None:
    """The first line that ``--version`` prints; None if it fails."""
    done = _run([program, "--version"])
    return _first(done.stdout) if done is not None else None


def plugin_version(program: str) -> str | None:
    """The first line that a CNI plugin prints without a command; None if it fails."""
    done = _run([program], {name: value for name, value in os.environ.items() if not name.startswith("CNI_")})
    return _first(done.stderr or done.stdout) if done is not None else None


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str] | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
            errors="replace",
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done if done.returncode == 0 else None


def _first(text: str) -> str:
    return text.partition("\n")[0].strip()[:200]


def network(config: Config) -> str | None:
    """Whether the network's plugins support its CNI version, and report that they are ready if that can be asked."""
    room = Network(conf_dir=config.cni_conf_dir, bin_dirs=config.cni_bin_dirs, timeout=config.cni_timeout)
    return asyncio.run(room.ready())


def features(runtime: RuntimeHandler) -> tuple[str, ...] | None:
    """The optional features of an OCI runtime; None if it does not report them."""
    told = asyncio.run(runtime_features.ask(runtime_of(runtime, "")))
    if told is None:
        return None
    found = [
        ("recursive read-only mounts", told.recursive_readonly_mounts),
        ("id-mapped mounts", told.idmapped_mounts),
    ]
    return tuple(name for name, there in found if there)


def container(config: Config, handler: str) -> str | None:
    """Run a container with the infra program alone, in namespaces and a cgroup of its own, and remove it."""
    key = f"check{secrets.token_hex(8)}"
    above = config.state
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    directory = tempfile.mkdtemp(prefix="check-", dir=above)
    parent = cgroups.own_parent(config.cgroup_driver, key)
    runtime = OciRuntime.of(config.runtimes[handler], os.path.join(directory, "runtimes"))
    trouble = None
    try:
        _write_bundle(config, directory, cgroups.spec_path(parent, key))
        done = subprocess.run(
            runtime.run_command(key, parent, bundle=directory),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
            errors="replace",
        )
        trouble = _last(done.stderr or done.stdout) if done.returncode else None
    except subprocess.TimeoutExpired:
        trouble = f"it took longer than {_SECONDS:g} s"
    except OSError as e:
        trouble = str(e)
    finally:
        delete = runtime.delete_command(key, parent)
        subprocess.run(delete, capture_output=True, timeout=_SECONDS, check=False)
        try:
            asyncio.run(cgroups.remove_pod(parent))
        except CriError as e:
            trouble = trouble or str(e)
        left = _deleted(directory)
    return trouble or left


def _write_bundle(config: Config, directory: str, cgroups_path: str) -> None:
    rootfs = os.path.join(directory, "rootfs")
    for name in ("proc", "dev"):
        os.makedirs(os.path.join(rootfs, name))
    with open(os.path.join(rootfs, "infra"), "w"):
        pass
    document = build_infra(
        program=config.infra,
        rootfs=rootfs,
        pod=PodFacts("", "", "", "", "", None, None, None, None),
        host=host.facts(),
        cgroups_path=cgroups_path,
    )
    document["process"]["args"] = ["/infra", "--version"]
    kinds = {namespace["type"] for namespace in document["linux"]["namespaces"]}
    document["linux"]["namespaces"] += [{"type": kind} for kind in ("network", "ipc", "uts") if kind not in kinds]
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(document, f)


def clock_is_synchronised() -> bool:
    """Whether a program synchronises the kernel's clock (adjtimex(2))."""
    # struct timex with all fields zero sets nothing. It has 208 bytes on 64-bit machines.
    timex = ctypes.create_string_buffer(256)
    state: int = ctypes.CDLL(None).adjtimex(timex)
    return state not in (-1, _TIME_ERROR)


def _in_scratch(directory: str, work: Callable[[], str | None]) -> str | None:
    """Do ``work`` in a directory of its own within ``directory``, and in a mount namespace of its own."""
    try:
        scratch = tempfile.mkdtemp(prefix=".check-", dir=directory)
    except OSError as e:
        return f"it is not writable ({e.strerror})"

    def enter() -> str | None:
        mounts.unshare(mounts.CLONE_FS | mounts.CLONE_NEWNS)
        mounts.mount("none", "/", None, mounts.MS_REC | mounts.MS_SLAVE)
        os.chdir(scratch)
        return work()

    try:
        trouble = _in_thread(enter)
    finally:
        left = _deleted(scratch)
    return trouble or left


def _deleted(directory: str) -> str | None:
    """Delete the directory of a try; the reason if that fails."""
    try:
        removal.remove_path(directory)
    except OSError as e:
        return f"{directory} cannot be deleted: {e}"
    return None


def _in_thread(work: Callable[[], str | None]) -> str | None:
    """Do ``work`` in a thread whose namespaces end with it. An error of the system is returned as the reason."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(work).result()
        except (CriError, OSError, subprocess.SubprocessError) as e:
            return str(e)


def _last(text: str) -> str:
    """The last line that a program printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it fails without a message"
