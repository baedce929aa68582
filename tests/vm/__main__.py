"""``python -m tests.vm test`` is make test-vm; ``python -m tests.vm run -- COMMAND`` is one command in a machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.vm import image as images
from tests.vm import releases
from tests.vm.image import ImageError
from tests.vm.machine import PROJECT, PYTHON, SECURITY, Machine, MachineError, machine
from tests.vm.releases import BuildError
from tests.vm.suites import CERTS, SUITES, Result, Suite, cases, table

CRASHES = 3  # machines that may be lost in a run
BUDGET = 31 * 60.0  # seconds for a whole run, a cold cache included
PACKAGES = "/opt/packages"
TOOLS = "/opt/programs/bin"
RESULTS = f"{images.PROJECT}/build/vm"


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("image", help="make the disk, or find it made")
    test = commands.add_parser("test", help="run suites of tests, and print a table")
    test.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it")
    test.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(f'"{suite.name}"' for suite in SUITES))
    run = commands.add_parser("run", help="run one command in a fresh machine")
    run.add_argument("--put", action="append", default=[], metavar="FILE:PATH", help="copy a file into the guest first")
    run.add_argument("--tree", action="store_true", help="put the work tree into the guest first; commands run in it")
    run.add_argument("--security", choices=SECURITY, default="apparmor", help="the kernel's security module")
    run.add_argument("--timeout", type=float, default=600.0)
    run.add_argument("words", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the machine is ended too
    try:
        if options.command == "test":
            unknown = set(options.suites) - {suite.name for suite in SUITES}
            if unknown:
                parser.error(f"no such suite: {', '.join(unknown)}")
            wanted = [
                suite for suite in SUITES if suite.name in options.suites or (suite.default and not options.suites)
            ]
            return run_suites(wanted, options.budget)
        disk = images.image()
        if options.command == "image":
            print(disk.disk)
            return 0
        return run_command(options)
    except (ImageError, MachineError, BuildError) as error:
        print(error, file=sys.stderr)
        return 2


def run_command(options: argparse.Namespace) -> int:
    """One command, its output passed on; its exit status."""
    with machine(images.image(), options.security) as guest:
        for pair in options.put:
            source, _, target = pair.partition(":")
            with open(source, "rb") as f:
                guest.put(target, f.read(), 0o755)
        if options.tree:
            guest.put_project()
        return guest.run(
            options.words,
            seconds=options.timeout,
            tee=_to_stdout,
            cwd=PROJECT if options.tree else "/root",
            env={"PYTHONPATH": PROJECT},
        ).status


def run_suites(wanted: Sequence[Suite], budget: float) -> int:
    """The suites in one machine, results in RESULTS, the table on standard output; 0 where nothing is amiss."""
    began = time.monotonic()
    shutil.rmtree(RESULTS, ignore_errors=True)
    os.makedirs(RESULTS)
    with _step("the image"):
        disk = images.image()
    with _step("the packages"):
        packages = releases.packages(images.PROJECT, images.PYTHON)
    if releases.RELEASED_PACKAGE not in packages:
        print(f"  no release is upgraded: {releases.NO_HISTORY}")
    tools = {program for suite in wanted for program in suite.programs}
    results: list[Result] = []
    left = list(wanted)
    crashes = 0
    while left:
        try:
            security = left[0].security
            with machine_with(disk, security, packages, tools) as guest:
                while left and left[0].security == security:
                    results.append(run_suite(guest, left[0], budget - (time.monotonic() - began)))
                    left.pop(0)
        except MachineError as error:
            # An emulated kernel that changes its own code while another processor runs it may trip over that.
            crashes += 1
            print(f"the machine is lost, for the {crashes}. time:\n{error}", file=sys.stderr)
            if crashes == CRASHES:
                results += [Result(suite.name, 0, trouble="not run: the machine was lost too often") for suite in left]
                break
    print(f"\n{table(results)}")
    print(f"all of it took {time.monotonic() - began:.0f} s; logs are in {os.path.relpath(RESULTS)}", file=sys.stderr)
    return 0 if all(result.good for result in results) else 1


@contextlib.contextmanager
def machine_with(
    disk: images.Image, security: str, packages: Mapping[str, bytes], tools: set[str]
) -> Iterator[Machine]:
    """A machine that has all that the suites need; its journal and console are kept. Raises MachineError."""
    with contextlib.ExitStack() as stack:
        with _step("the boot"):
            guest = stack.enter_context(machine(disk, security))
        print(f"  {guest.accelerator}, {security}, {guest.check(['uname', '-r']).decode().strip()}")
        with _step("what goes into the guest"):
            guest.put_project()
            for name, data in packages.items():
                guest.put(f"{PACKAGES}/{name}", data)
            put_tools(guest, tools)
        try:
            yield guest
        finally:
            with contextlib.suppress(MachineError):
                _keep("journal.txt", guest.check(["journalctl", "--boot", "--no-pager"], seconds=120))
            shutil.copy(guest.console, RESULTS)


def run_suite(guest: Machine, suite: Suite, left: float) -> Result:
    """One suite, within what is left of the time."""
    missing = [program for program in suite.programs if guest.run(["test", "-x", f"{TOOLS}/{program}"]).status]
    if missing:
        return Result(suite.name, 0, skipped=f"CRISERVER_VM_TOOLS names no directory with {', '.join(missing)}")
    if left < 30:
        return Result(suite.name, 0, trouble="not run: the time is used up")
    print(f"{suite.name} ...", flush=True)
    began = time.monotonic()
    environment = {
        "PYTHONPATH": PROJECT,
        "PATH": f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{TOOLS}",
        "CRISERVER_NODE_PACKAGES": PACKAGES,
        "E2E_SLOWNESS": "1" if guest.accelerator == "kvm" else "5",
        **suite.environment,
    }
    report = "/tmp/report.xml"
    guest.check(["rm", "-f", report])
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *suite.tests]
    seconds = min(suite.seconds, left)
    with open(f"{RESULTS}/{_file_name(suite.name)}.log", "wb") as log:
        done = guest.run(command, cwd=PROJECT, env=environment, seconds=seconds, tee=log.write)
    took = time.monotonic() - began
    if done.status == 137:
        trouble = f"ended at its deadline of {seconds:.0f} s"
    elif done.status not in (0, 1):
        trouble = f"pytest ended with {done.status}: {done.stdout.decode(errors='replace')[-500:]}"
    else:
        trouble = ""
    found = guest.run(["cat", report])
    if found.status == 0:
        _keep(f"{_file_name(suite.name)}.xml", found.stdout)
    return Result(suite.name, took, cases(found.stdout) if found.status == 0 else (), trouble)


def put_tools(guest: Machine, programs: set[str]) -> None:
    """Those of $CRISERVER_VM_TOOLS that are wanted; what is not there is told by the suites that need it."""
    directory = os.environ.get("CRISERVER_VM_TOOLS", "")
    for program in programs:
        if directory and os.path.exists(f"{directory}/{program}"):
            with open(f"{directory}/{program}", "rb") as f:
                guest.put(f"{TOOLS}/{program}", f.read(), 0o755)
    if "critest" in programs:
        # The suite's images come from a registry on the host's loopback, which the guest sees at 10.0.2.2.
        server = f"http://10.0.2.2:{os.environ.get('CRISERVER_VM_REGISTRY_PORT', '5000')}"
        hosts = f'server = "{server}"\n[host."{server}"]\ncapabilities = ["pull", "resolve"]\n'
        for name in ("registry.k8s.io", "k8s.gcr.io", "gcr.io"):
            guest.put(f"{CERTS}/{name}/hosts.toml", hosts.encode())


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    print(f"{name} ...", end=" ", flush=True)
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def _file_name(suite: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in suite)


def _keep(name: str, data: bytes) -> None:
    with open(f"{RESULTS}/{name}", "wb") as f:
        f.write(data)


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
