"""What all tests share.

An example of hypothesis has no deadline: its time depends on the machine. A test has one, which is so long that only a
hang reaches it. Then the test fails by its name, and its fixtures clean up.
"""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.waiting import SLOWNESS

# Seconds, with what the test's fixtures take. The slowest takes a minute; some that take longer say so themselves.
HANGS = 600

settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in what it starts in the background. Programs that tests start must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None and config.getoption("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANGS * SLOWNESS))
