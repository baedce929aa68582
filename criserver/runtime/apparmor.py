"""AppArmor: the profile that containers have by default, its loading, and which one a container runs under."""

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

# The features that the rules are meant for: a kernel that can do more is not to refuse what no rule speaks of.
_ABI = "/etc/apparmor.d/abi/3.0"
_TIMEOUT = 30.0
# Where the parser is on a node whose PATH has no directories for root.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# apparmor.d(5). Containers have paths of their own, so nothing of the files of an image is ruled; what is ruled is the
# kernel's: whoever gets out of its namespaces or is given capabilities is still not to set the node's kernel.
_PROFILE = """
profile criserver-default flags=(attach_disconnected, mediate_deleted) {
  file,
  capability,
  network,
  unix,
  umount,

  # Mounts are the OCI runtime's to make. Quietly: images try it, and fall back.
  deny mount,

  # Among themselves, and from whoever stops a container: Debian's policy gives runc and crun names of their own.
  signal (send, receive) peer=criserver-default,
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  ptrace (trace, read, tracedby, readby) peer=criserver-default,

  # Of /proc what belongs to a process may be written, and of its sysctls those of System V shared memory.
  deny /proc/[^0-9]* wkl,
  deny /proc/[^0-9s]*/** wkl,
  deny /proc/s[^y]*/** wkl,
  deny /proc/sys/{[^k],k[^e]}** wkl,
  deny /proc/sys/kernel/{[^s],s[^h],sh[^m]}** wkl,
  # The kernel's memory is not read either.
  deny /proc/{kcore,kmem,mem} rwklm,

  # Of /sys the cgroups alone; what names the machine, its power and this policy is not even read.
  deny /sys/{[^f],f[^s]}** wkl,
  deny /sys/fs/{[^c],c[^g],cg[^r]}** wkl,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/{,**} rwklm,
}
"""


def profile() -> str:
    """The default profile's text, as apparmor_parser(8) takes it."""
    return ("abi <abi/3.0>,\n" if os.path.exists(_ABI) else "") + _PROFILE


async def load() -> bool:
    """Load the default profile, in place of an older one of its name; whether it is loaded now.

    Nothing is done where the kernel has no AppArmor. A failure is logged.
    """
    if host.apparmor_profiles() is None:
        return False
    parser = shutil.which("apparmor_parser", path=_PATH)
    if parser is None:
        log.warning("AppArmor is on, and apparmor_parser is not there: containers have no default profile")
        return False
    try:
        done = await command.run([parser, "--replace", "--skip-cache", "--quiet"], _TIMEOUT, stdin=profile().encode())
    except TimeoutError:
        log.warning("apparmor_parser does not load the default profile in time", seconds=_TIMEOUT)
        return False
    if done.code:
        log.warning("the default AppArmor profile cannot be loaded", error=done.words)
    return done.code == 0


async def choose(config: ContainerConfig) -> str:
    """The name of the profile that a container is to run under; "" on a node without AppArmor.

    Raises FailedPreconditionError for a profile that cannot be enforced here.
    """
    asked, loaded = config.security.apparmor, host.apparmor_profiles()
    if loaded is None:
        if asked in ("", RUNTIME_DEFAULT, UNCONFINED):
            return ""
        raise FailedPreconditionError(
            f"container {config.name}: AppArmor profile {quoted(asked)} cannot be enforced: this node has no AppArmor"
        )
    if asked == UNCONFINED:
        return UNCONFINED
    if asked not in ("", RUNTIME_DEFAULT):
        if asked not in loaded:
            raise FailedPreconditionError(
                f"container {config.name}: AppArmor profile {quoted(asked)} is not loaded; load it with apparmor_parser"
            )
        return asked
    found = await default()
    if found != DEFAULT and asked:
        raise FailedPreconditionError(
            f"container {config.name}: the default AppArmor profile is asked for and is not loaded; the log says why"
        )
    return found


async def default() -> str:
    """The profile of a container that names none: the default one, which is loaded where it is missing.

    "" where the kernel has no AppArmor, "unconfined" where the profile cannot be loaded.
    """
    loaded = host.apparmor_profiles()
    if loaded is None:
        return ""
    # Looked for each time: aa-remove-unknown takes away what has no file in /etc/apparmor.d.
    return DEFAULT if DEFAULT in loaded or await load() else UNCONFINED
