"""What all tests share.

The examples of hypothesis are always the same, so that no run fails by chance. CRISERVER_EXAMPLES is the number of
examples for a run with others. An example has no deadline: its time depends on the machine. A test has one, which is so
long that only a hang reaches it. Then the test fails by its name, and its fixtures clean up.
"""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.waiting import SLOWNESS

# Seconds, with what the test's fixtures take. The slowest takes a minute; some that take longer say so themselves.
HANGS = 600
# Of a daemon's log in the report of a failure.
LINES = 200

EXAMPLES = os.environ.get("CRISERVER_EXAMPLES")

settings.register_profile(
    "project",
    deadline=None,
    derandomize=EXAMPLES is None,
    max_examples=int(EXAMPLES or 100),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in what it starts in the background. Programs that tests start must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None and config.getoption("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANGS * SLOWNESS))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """A failure is reported with what the daemons of the test have logged: their directories are deleted at its end."""
    if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
        return
    for name, value in getattr(item, "funcargs", {}).items():
        if callable(getattr(value, "daemon_log", None)):
            with contextlib.suppress(OSError):
                lines = value.daemon_log().splitlines()[-LINES:]
                item.add_report_section(call.when, f"log of {name}", "\n".join(lines))
