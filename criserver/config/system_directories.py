"""Which directories can be ``root`` and ``state``: neither is one of the system's, and neither is in the other."""

from __future__ import annotations

import os

# Directories that other programs share (Filesystem Hierarchy Standard 3.0), and those of other container runtimes.
_SYSTEM = frozenset(
    "/ /bin /boot /dev /dev/shm /efi /etc /home /lib /lib32 /lib64 /libx32 /lost+found /media /mnt /opt /proc /root "
    "/run /run/lock /run/systemd /run/user /sbin /srv /sys /tmp /usr /usr/bin /usr/lib /usr/local /usr/sbin /usr/share "
    "/var /var/cache /var/lib /var/lock /var/log /var/mail /var/opt /var/run /var/spool /var/tmp /etc/cni /opt/cni "
    "/var/lib/cni /var/lib/containerd /var/lib/containers /var/lib/docker /var/lib/kubelet /var/log/containers "
    "/var/log/pods /run/containerd /run/containers /run/crio /run/docker /run/runc".split()
)
_KERNEL = ("/proc", "/sys")


def fault(root: str, state: str) -> tuple[str, str] | None:
    """The key that is wrong, and why; None if neither is. Symbolic links are followed where they exist."""
    for key, path in (("root", root), ("state", state)):
        real = os.path.realpath(path)
        if _SYSTEM & {path, real} or any(_is_in(real, kernel) for kernel in _KERNEL):
            named = path if path == real else f"{path} ({real})"
            return key, (
                f"{key} = {named!r}: other programs use this directory, and `criserver reset` deletes in it; give "
                f"{key} a directory of its own, such as {os.path.join(path, 'criserver')!r}"
            )
    first, second = os.path.realpath(root), os.path.realpath(state)
    if first == second:
        return "state", f"root = {root!r} and state = {state!r} are the same directory; each needs one of its own"
    for (outer, outer_path), (inner, inner_path) in (
        (("root", first), ("state", second)),
        (("state", second), ("root", first)),
    ):
        if _is_in(inner_path, outer_path):
            return inner, f"{inner} = {inner_path!r} is in {outer} = {outer_path!r}; put it outside"
    return None


def _is_in(path: str, directory: str) -> bool:
    return path.startswith(directory + "/")
