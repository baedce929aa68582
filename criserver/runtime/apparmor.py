"""AppArmor: the default profile of containers, how it is loaded, and which profile a container runs under."""

from __future__ import annotations

import os
import shutil

import structlog

from criserver.errors import FailedPreconditionError
from criserver.model import ContainerConfig
from criserver.runtime import command, host
from criserver.text import quoted

log = structlog.get_logger(__name__)

DEFAULT = "criserver-default"
RUNTIME_DEFAULT = "runtime/default"
UNCONFINED = "unconfined"

# The feature set that the profile was written for. Without it a newer kernel would refuse actions that no rule names.
_ABI = "/etc/apparmor.d/abi/3.0"
_TIMEOUT = 30.0
# Where apparmor_parser is searched: the daemon's PATH may lack the directories of root's programs.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# apparmor.d(5). The profile has no rules for an image's files, as a container sees only its own. It protects the files
# of the kernel: a process must not change the node's kernel, even if it escapes its namespaces or has capabilities.
_PROFILE = """
profile criserver-default flags=(attach_disconnected, mediate_deleted) {
  file,
  capability,
  network,
  unix,
  umount,

  # The OCI runtime makes all mounts. The refusal is not logged: images try to mount, and go on without.
  deny mount,

  # Signals between containers, and from processes that stop one. Debian's policy has profiles named runc and crun.
  # A process may be confined by this profile and by more: crun adds its own to a container with no_new_privs, and newer
  # kernels add "unconfined" to what is executed in a container.
  signal (send, receive) peer=criserver-default{,//&**},
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  ptrace (trace, read, tracedby, readby) peer=criserver-default{,//&**},

  # In /proc a container may write the files of processes, and of the sysctls those of System V shared memory.
  deny /proc/[^0-9]* wkl,
  deny /proc/[^0-9s]*/** wkl,
  deny /proc/s[^y]*/** wkl,
  deny /proc/sys/{[^k],k[^e]}** wkl,
  deny /proc/sys/kernel/{[^s],s[^h],sh[^m]}** wkl,
  # A container must not read the kernel's memory either.
  deny /proc/{kcore,kmem,mem} rwklm,

  # In /sys a container may write cgroups only. It must not even read what identifies the machine, this policy, and
  # the machine's power use.
  deny /sys/{[^f],f[^s]}** wkl,
  deny /sys/fs/{[^c],c[^g],cg[^r]}** wkl,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/{,**} rwklm,
}
"""


def profile() -> str:
    """The text of the default profile, as apparmor_parser(8) reads it."""
    return ("abi <abi/3.0>,\n" if os.path.exists(_ABI) else "") + _PROFILE


async def load() -> bool:
    """Load the default profile, replacing an older one of the same name. Return whether it is loaded now.

    On a kernel without AppArmor this does nothing. A failure is logged.
    """
    if host.apparmor_profiles() is None:
        return False
    parser = shutil.which("apparmor_parser", path=_PATH)
    if parser is None:
        log.warning("AppArmor is on, but apparmor_parser is not installed: containers have no default profile")
        return False
    try:
        done = await command.run([parser, "--replace", "--skip-cache", "--quiet"], _TIMEOUT, stdin=profile().encode())
    except TimeoutError:
        log.warning("apparmor_parser did not load the default profile in time", seconds=_TIMEOUT)
        return False
    if done.code:
        log.warning("the default AppArmor profile cannot be loaded", error=done.message)
    return done.code == 0


async def choose(config: ContainerConfig) -> str:
    """The name of the profile that a container will run under; "" on a node without AppArmor.

    Raises FailedPreconditionError for a profile that this node cannot enforce.
    """
    requested, loaded = config.security.apparmor, host.apparmor_profiles()
    if loaded is None:
        if requested in ("", RUNTIME_DEFAULT, UNCONFINED):
            return ""
        raise FailedPreconditionError(
            f"container {config.name}: AppArmor profile {quoted(requested)} cannot be enforced: "
            "this node has no AppArmor"
        )
    if requested == UNCONFINED:
        return UNCONFINED
    if requested not in ("", RUNTIME_DEFAULT):
        if requested not in loaded:
            raise FailedPreconditionError(
                f"container {config.name}: AppArmor profile {quoted(requested)} is not loaded; "
                "load it with apparmor_parser"
            )
        return requested
    chosen = await default()
    if chosen != DEFAULT and requested:
        raise FailedPreconditionError(
            f"container {config.name}: the default AppArmor profile is requested but is not loaded; "
            "the daemon's log says why"
        )
    return chosen


async def default() -> str:
    """The profile of a container that names none: the default profile, which is loaded first if it is missing.

    "" if the kernel has no AppArmor, "unconfined" if the default profile cannot be loaded.
    """
    loaded = host.apparmor_profiles()
    if loaded is None:
        return ""
    # This is checked each time: aa-remove-unknown(8) unloads profiles that have no file in /etc/apparmor.d.
    return DEFAULT if DEFAULT in loaded or await load() else UNCONFINED
