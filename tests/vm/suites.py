"""The suites of the virtual machine, and the table of their results."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

RUNC = "runc"  # the stable suite's
NEWER_RUNC = "/opt/newer/usr/sbin/runc"
CRUN = "/usr/bin/crun"
CERTS = "/opt/programs/certs.d"  # where critest's registries are said to be the host's


@dataclass(frozen=True)
class Suite:
    """One run of pytest in the guest.

    ``tests`` are paths below the project, or pytest's options. ``programs`` of $CRISERVER_VM_TOOLS are needed: without
    them the suite is skipped. ``seconds`` is its deadline, for an emulated processor. ``security`` is the kernel's
    security module, by which suites have machines of their own. A suite outside the ``default`` ones is run where it is
    named.
    """

    name: str
    tests: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 300
    programs: Sequence[str] = ()
    default: bool = True
    security: str = "apparmor"


def _files(*names: str) -> list[str]:
    return [f"tests/e2e/test_{name}.py" for name in names]


def _attacks(*names: str) -> list[str]:
    return [f"tests/security/test_{name}.py" for name in names]


def _daemon(driver: str, runtime: str) -> dict[str, str]:
    named = {"E2E_RUNTIME": runtime, "CRITEST_RUNTIME": runtime}
    # Of pods with user namespaces, which the stable suite's cannot have.
    return {"E2E_CGROUP_DRIVER": driver, "CRISERVER_TEST_RUNC": NEWER_RUNC if runtime == RUNC else runtime, **named}


CRITEST = Suite(
    "critest",
    ["tests/conformance/test_critest.py", "-k", "all"],
    {**_daemon("systemd", NEWER_RUNC), "CRITEST_CERTS": CERTS},
    seconds=2400,
    programs=["critest"],
    default=False,
)

# The most worth first: what is over the budget is told, but not run.
SUITES = (
    # This suite is skipped on a node that has cgroups of a kubelet's pods. So it comes before those that make some.
    Suite(
        "names in a kubelet's metrics",
        ["tests/conformance/test_standalone_kubelet.py"],
        _daemon("systemd", RUNC),
        420,
        programs=["kubelet"],
    ),
    Suite("the package", ["tests/node/test_install.py", "tests/node/test_restart.py"], seconds=420),
    Suite(
        "an upgrade",
        ["tests/node/test_upgrade.py"],
        {"CRISERVER_TEST_RUNC": NEWER_RUNC, "CRISERVER_TEST_CRUN": CRUN},
        seconds=600,
    ),
    Suite("systemd, AppArmor", _files("systemd", "apparmor"), _daemon("systemd", RUNC), seconds=420),
    Suite(
        "runc, systemd driver",
        [*_files("resources", "stats"), "tests/e2e/test_node_defaults.py::test_a_writable_cgroup_needs_version_2"],
        _daemon("systemd", RUNC),
        480,
    ),
    Suite("newer runc, systemd driver", _files("userns", "mounts"), _daemon("systemd", NEWER_RUNC), 420),
    Suite("crun, systemd driver", _files("userns"), _daemon("systemd", CRUN), 420),
    Suite(
        "attacks, runc, systemd driver",
        [
            *_attacks("local_users", "accounts"),
            "-k",
            "nobody_but_root or mounted_from or never_a_name",
        ],
        _daemon("systemd", RUNC),
    ),
    Suite(
        "attacks, crun, systemd driver",
        [*_attacks("starts", "local_users"), "-k", "hangs_ends or gets_through or nodes_dev"],
        _daemon("systemd", CRUN),
    ),
    Suite("a kubelet", ["tests/node/test_kubelet.py"], seconds=420, programs=["kubelet"]),
    Suite("SELinux", _files("selinux"), _daemon("systemd", NEWER_RUNC), security="selinux"),
    # Other combinations of the same parts, for which the budget is too small.
    Suite("pods, systemd driver", _files("pods", "security"), _daemon("systemd", RUNC), 500, default=False),
    Suite(
        "names in a kubelet's metrics, cgroupfs",
        ["tests/conformance/test_standalone_kubelet.py"],
        _daemon("cgroupfs", RUNC),
        420,
        programs=["kubelet"],
        default=False,
    ),
    Suite("runc, cgroupfs driver", _files("resources", "stats"), _daemon("cgroupfs", RUNC), default=False),
    Suite("crun, cgroups and mounts", _files("mounts", "resources"), _daemon("systemd", CRUN), 420, default=False),
    Suite("newer runc, cgroups", _files("resources"), _daemon("systemd", NEWER_RUNC), 420, default=False),
    CRITEST,
    replace(CRITEST, name="critest with SELinux", security="selinux"),
)


@dataclass(frozen=True)
class Case:
    """One test: ``outcome`` is "passed", "failed" or "skipped", ``words`` the reason of a skip or the failure."""

    name: str
    outcome: str
    seconds: float
    words: str = ""


@dataclass(frozen=True)
class Result:
    """What came of a suite; ``trouble`` is why there is nothing, or not all, to tell."""

    suite: str
    seconds: float
    cases: Sequence[Case] = ()
    trouble: str = ""
    skipped: str = ""

    def count(self, outcome: str) -> int:
        """How many cases ended so."""
        return sum(case.outcome == outcome for case in self.cases)

    @property
    def good(self) -> bool:
        """Whether nothing is amiss; a suite that was skipped as a whole is no failure."""
        return not self.trouble and not self.count("failed") and bool(self.cases or self.skipped)


def cases(report: bytes) -> list[Case]:
    """The cases of a JUnit report; a test and the failure of its teardown are one."""
    found: dict[str, Case] = {}
    for element in ET.fromstring(report).iter("testcase"):
        module = element.get("classname", "").rpartition(".")[2]
        name = f"{module}::{element.get('name')}"
        outcome, words = "passed", ""
        for child in element:
            if child.tag in ("failure", "error"):
                outcome, words = "failed", child.text or ""
            elif child.tag == "skipped":
                outcome, words = "skipped", child.get("message") or ""
        seconds = float(element.get("time", "0"))
        if (earlier := found.get(name)) is not None:
            seconds += earlier.seconds
            if earlier.outcome == "failed":
                outcome, words = earlier.outcome, earlier.words
        found[name] = Case(name, outcome, seconds, words)
    return list(found.values())


def table(results: Sequence[Result]) -> str:
    """All results for a reader: a line a suite, the failures, the reasons of skips, and what took longest."""
    width = max(len(result.suite) for result in results)
    lines = [f"{'suite':{width}}  passed  failed  skipped  seconds"]
    for r in results:
        counts = "  ".join(f"{r.count(outcome):{len(outcome)}}" for outcome in ("passed", "failed", "skipped"))
        note = f"  skipped: {r.skipped}" if r.skipped else f"  {r.trouble}"
        lines.append(f"{r.suite:{width}}  {counts}  {r.seconds:7.0f}{note}".rstrip())
    reasons: dict[str, int] = {}
    for case in (case for r in results for case in r.cases if case.outcome == "skipped"):
        reasons[case.words] = reasons.get(case.words, 0) + 1
    if reasons:
        lines += ["", "why tests were skipped:"]
        lines += [f"  {count:3} {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])]
    longest = sorted(((c.seconds, r.suite, c.name) for r in results for c in r.cases), reverse=True)[:10]
    lines += ["", "what took longest:", *(f"  {seconds:5.0f} s  {suite}: {name}" for seconds, suite, name in longest)]
    for r in results:
        for case in r.cases:
            if case.outcome == "failed":
                lines += [
                    "",
                    f"failed: {r.suite}: {case.name}",
                    *(f"  {line}" for line in case.words.splitlines()[-25:]),
                ]
    totals = [sum(r.count(outcome) for r in results) for outcome in ("passed", "failed", "skipped")]
    # A suite that did not end counts as failed: its missing cases are not successes.
    totals[1] += sum(bool(r.trouble) for r in results)
    return "\n".join([*lines, "", "{} passed, {} failed, {} skipped".format(*totals)])
