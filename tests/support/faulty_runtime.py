"""An OCI runtime that can be harmed at each of its calls, and with it the shim that calls it; and criu.

Each is a script in the program's place. While the file "order" is there, it writes a line "CALLER>PROGRAM:VERB#N" to
the log of points. Where the order names that point, it deletes the order and does what the order says:

1. killed: the runtime is killed before it does anything;
2. cut: it is killed in the midst of its work;
3. stopped: it is stopped, and does its work once it is thawed;
4. hanging: it does nothing and ignores SIGTERM;
5. shim killed, shim stopped: this happens to its caller, and the runtime does its work.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.support.criu import REAL_CRIU, criu_trouble
from tests.support.fixtures import RUNC
from tests.support.node import RUNTIME, Node

_SCRIPT = r"""#!/bin/sh
base={base}
[ -e $base/order ] || exec {program} "$@"
for id; do :; done
verb=
for word; do case $word in run|exec|delete|update|checkpoint|check|swrk) verb=$word; break;; esac; done
if [ -z "$verb" ] || [ "$(cat $base/bystander)" = "$id" ]; then exec {program} "$@"; fi
case $(cat /proc/$PPID/comm) in criserver-shim) caller=shim;; run*) caller=runtime;; *) caller=daemon;; esac
point="$caller>{name}:$verb"
echo "$point" >> $base/calls
point="$point#$(grep -cx "$point" $base/calls)"
read -r wanted fault < $base/order
if [ "$wanted" != "$point" ]; then
    echo "$point" >> $base/points
    exec {program} "$@"
fi
rm $base/order
echo "hit $point" >> $base/points
case $fault in
killed) kill -KILL $$;;
cut) {program} "$@" & sleep {cut}; kill -KILL $! $$;;
stopped) echo "stopped $$" >> $base/points; kill -STOP $$;;
hanging) trap '' TERM INT HUP; while :; do sleep 0.2; done;;
"shim killed") kill -KILL $PPID;;
"shim stopped") echo "stopped $PPID" >> $base/points; kill -STOP $PPID;;
esac
exec {program} "$@"
"""
# Seconds after which the runtime is killed in the midst of its work: a run takes about 20 ms.
_CUT = "0.008"

FAULTS = {
    "shim": ("killed", "cut", "stopped", "hanging", "shim killed", "shim stopped"),
    "runtime": ("killed", "cut", "stopped", "hanging"),
    "daemon": ("cut",),  # the others are faults of a program that the daemon starts
}


class FaultyRuntime:
    """The runtimes of a node whose configuration names ``BASE/runtime`` and ``BASE/newer``, and its criu.

    Made before the daemon is started. ``programs`` is a directory for the daemon's PATH.
    """

    def __init__(self, node: Node) -> None:
        self._base = node.base
        self.programs = f"{node.base}/programs"
        os.mkdir(self.programs)
        config = Path(node.config)
        config.write_text(config.read_text().replace("BASE", node.base))
        self._replace(f"{node.base}/runtime", "runc", shutil.which(RUNTIME))
        self._replace(f"{node.base}/newer", "runc", RUNC)
        self._replace(f"{self.programs}/criu", "criu", "" if criu_trouble() else REAL_CRIU)
        self.spare("none")

    def _replace(self, path: str, name: str, program: str | None) -> None:
        if program:
            Path(path).write_text(_SCRIPT.format(base=self._base, program=program, name=name, cut=_CUT))
            os.chmod(path, 0o755)

    def spare(self, container: str) -> None:
        """The container whose calls are no points."""
        Path(self._base, "bystander").write_text(container)

    def record(self) -> None:
        self.harm("none", "")

    def harm(self, point: str, fault: str) -> None:
        self.off()
        Path(self._base, "order.new").write_text(f"{point} {fault}\n")
        os.rename(f"{self._base}/order.new", f"{self._base}/order")

    def off(self) -> None:
        for name in ("order", "calls"):
            Path(self._base, name).unlink(missing_ok=True)
